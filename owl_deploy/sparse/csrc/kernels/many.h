// Many tokens (prefill) lie in the lanes: inputs are transposed to [columns, tokens], in tiles of up to 128 tokens, and
// each weight multiplies a row of them, so that registers hold one output for 16 tokens each.
//
// As many tiles as the scratch has room for are taken at once: one stage transposes them, the next has an item for each
// tile and group of slices.
#pragma once

#include <cstring>

#include "kernels/finish.h"
#include "kernels/kernel.h"
#include "kernels/many_bytes.h"
#include "kernels/many_words.h"

namespace owl {
namespace {

constexpr std::int64_t kTileTokens = 128;           // most of a tile; its 32 rows of a block of inputs fit in L1
constexpr std::int64_t kTransposed = 256;           // columns that one item transposes
constexpr std::int64_t kScratchBytes = 16LL << 20;  // of transposed inputs at once, unless one tile has more

struct Tiles {
  std::int64_t columns, count, at_once;
  std::int64_t tokens;  // of each tile, a multiple of 16

  Tiles(std::int64_t padded_columns, std::int64_t all) : columns(padded_columns) {
    count = ceil_div(all, kTileTokens);
    tokens = round_up(ceil_div(all, count), std::int64_t{kLanes});
    at_once = std::clamp(kScratchBytes / bytes_of_one(), std::int64_t{1}, count);
  }
  std::int64_t bytes_of_one() const { return tokens * columns * static_cast<std::int64_t>(sizeof(float)); }
  // Two stages belong to one turn.
  std::int64_t first_of(int stage) const { return stage / 2 * at_once; }
  std::int64_t in_turn(int stage) const { return std::min(at_once, count - first_of(stage)); }
};

// What a thread needs for one item.
struct Workspace {
  alignas(64) float sums[kMaxRows * kTileTokens];  // [rows, tokens]
  float columns[kLanes][kMaxRows];                 // of 16 tokens, transposed back
};

template <class Isa, class F>
class ManyTokens {
 public:
  static constexpr std::size_t kWorkspaceBytes = sizeof(Workspace);

  static int stages(const Header& h, std::int64_t tokens) {
    const Tiles tiles(padded_columns<F>(h), tokens);
    return static_cast<int>(2 * ceil_div(tiles.count, tiles.at_once));
  }

  static std::int64_t items(const Header& h, std::int64_t tokens, int stage) {
    const Tiles tiles(padded_columns<F>(h), tokens);
    const std::int64_t of_tile = stage % 2 == 0 ? ceil_div(tiles.columns, kTransposed)
                                                : std::int64_t{ceil_div(h.slices, Kernel::slices_together(h))};
    return tiles.in_turn(stage) * of_tile;
  }

  static std::size_t scratch_bytes(const Header& h, std::int64_t tokens) {
    const Tiles tiles(padded_columns<F>(h), tokens);
    return static_cast<std::size_t>(tiles.at_once * tiles.bytes_of_one());
  }

  static void run(const Product& p, int stage, std::int64_t item, std::byte* workspace) {
    const Tiles tiles(padded_columns<F>(p.weights->header), p.tokens);
    if (stage % 2 == 0) {
      const std::int64_t pieces = ceil_div(tiles.columns, kTransposed);
      transpose(p, tiles, tiles.first_of(stage), item / pieces, item % pieces * kTransposed);
    } else {
      const std::int64_t in_turn = tiles.in_turn(stage);
      multiply(p, tiles, tiles.first_of(stage), item % in_turn, item / in_turn,
               *reinterpret_cast<Workspace*>(workspace));
    }
  }

 private:
  using Kernel = ManyKernel<Isa, F>;

  static float* inputs(const Product& p, const Tiles& tiles, std::int64_t tile) {
    return reinterpret_cast<float*>(p.scratch) + tile * tiles.tokens * tiles.columns;
  }

  static void transpose(const Product& p, const Tiles& tiles, std::int64_t first_tile, std::int64_t tile,
                        std::int64_t first) {
    const Header& h = p.weights->header;
    const std::int64_t end = std::min(first + kTransposed, tiles.columns);
    float* to = inputs(p, tiles, tile);
    const std::int64_t begin = (first_tile + tile) * tiles.tokens, count = std::min(tiles.tokens, p.tokens - begin);
    for (std::int64_t c = first; c < end; c += kLanes) {  // 16 x 16 at a time: a line of cache each way
      for (std::int64_t t = 0; t < tiles.tokens; t += kLanes) {
        for (std::int64_t i = 0; i < kLanes; ++i) {
          for (std::int64_t j = 0; j < kLanes; ++j) {
            const bool inside = c + i < h.columns && t + j < count;
            to[(c + i) * tiles.tokens + t + j] = inside ? p.x[(begin + t + j) * h.columns + c + i] : 0.0f;
          }
        }
      }
    }
  }

  static void multiply(const Product& p, const Tiles& tiles, std::int64_t first_tile, std::int64_t tile,
                       std::int64_t item, Workspace& work) {
    const Packed& packed = *p.weights;
    const Header& h = packed.header;
    const auto first_slice = static_cast<std::uint32_t>(item) * Kernel::slices_together(h);
    const Slices slices{first_slice, std::min(first_slice + Kernel::slices_together(h), h.slices)};
    std::memset(work.sums, 0, static_cast<std::size_t>(kMaxRows * tiles.tokens) * sizeof(float));
    Kernel::multiply(packed, slices, inputs(p, tiles, tile), tiles.tokens, work.sums);
    const std::int64_t first = (first_tile + tile) * tiles.tokens, count = std::min(tiles.tokens, p.tokens - first);
    for (std::uint32_t slice = slices.first; slice < slices.end; ++slice) {
      const float* of_slice = work.sums + (slice - slices.first) * h.slice_rows * tiles.tokens;
      for (std::int64_t t = 0; t < count; t += kLanes) {
        const std::int64_t width = std::min<std::int64_t>(kLanes, count - t);
        for (std::uint32_t row = 0; row < rows_of(h, slice); ++row) {
          for (std::int64_t j = 0; j < width; ++j) work.columns[j][row] = of_slice[row * tiles.tokens + t + j];
        }
        for (std::int64_t j = 0; j < width; ++j) {
          finish<F>(packed, slice, work.columns[j], p.y + (first + t + j) * outputs(h));
        }
      }
    }
  }
};

}  // namespace
}  // namespace owl
