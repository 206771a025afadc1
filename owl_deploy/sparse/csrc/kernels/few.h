// Few tokens (decode): a unit's weights go through registers once for several tokens. Of 4-bit weights all tokens go
// this way.
//
// Tokens are taken in turns, as many at once as the scratch has room for. In each, stage 0 has an item for each token,
// and prepares its inputs as the format's kernel reads them. Stage 1 has an item for each unit and up to 64 tokens.
// Stage 2 adds up the sums of a slice's panels, where it has several.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/few_bytes.h"
#include "kernels/few_nibbles.h"
#include "kernels/few_words.h"
#include "kernels/finish.h"
#include "kernels/kernel.h"

namespace owl {
namespace {

constexpr std::int64_t kSerialSums = 1 << 15;        // partial sums that are not worth another thread
constexpr std::int64_t kItemTokens = 64;             // that one item takes at most
constexpr std::int64_t kPreparedBytes = 16LL << 20;  // of inputs at once, unless 128 tokens have more

template <class Isa, class F>
class FewTokens {
 public:
  static constexpr std::size_t kWorkspaceBytes = 0;

  static int stages(const Header& h, std::int64_t tokens) {
    return static_cast<int>(kStages * ceil_div(tokens, at_once(h, tokens)));
  }

  static std::int64_t items(const Header& h, std::int64_t tokens, int stage) {
    const Turn turn(h, tokens, stage);
    if (stage % kStages == 0) return turn.count;
    if (stage % kStages == 1) return std::int64_t{h.slices} * h.panels * ceil_div(turn.count, kItemTokens);
    if (h.panels == 1) return 0;
    return sums_are_serial(h, turn.count) ? 1 : std::int64_t{h.slices};
  }

  static std::size_t scratch_bytes(const Header& h, std::int64_t tokens) {
    return static_cast<std::size_t>(at_once(h, tokens)) * bytes_of_token(h);
  }

  static void run(const Product& p, int stage, std::int64_t item, std::byte*) {
    const Header& h = p.weights->header;
    const Turn turn(h, p.tokens, stage);
    if (stage % kStages == 0) Kernel::prepare(h, p.x + (turn.first + item) * h.columns, inputs(p, item));
    if (stage % kStages == 1) multiply_item(p, turn, item);
    if (stage % kStages == 2) {
      const bool serial = sums_are_serial(h, turn.count);
      const auto first = static_cast<std::uint32_t>(serial ? 0 : item);
      const std::uint32_t end = serial ? h.slices : first + 1;
      for (std::uint32_t slice = first; slice < end; ++slice) add_panels(p, turn, slice);
    }
  }

 private:
  using Kernel = FewKernel<Isa, F>;
  static constexpr int kStages = 3;  // of a turn

  // The tokens that a stage is about.
  struct Turn {
    std::int64_t first, count, most;  // most: of any turn

    Turn(const Header& h, std::int64_t tokens, int stage) : most(at_once(h, tokens)) {
      first = stage / kStages * most;
      count = std::min(most, tokens - first);
    }
  };

  static std::int64_t at_once(const Header& h, std::int64_t tokens) {
    const auto room = kPreparedBytes / static_cast<std::int64_t>(bytes_of_token(h));
    return std::min(tokens, std::max(2 * kItemTokens, room / kItemTokens * kItemTokens));
  }
  static std::size_t bytes_of_token(const Header& h) {
    return stride(h) + (h.panels == 1 ? 0 : std::size_t{h.rows} * h.panels * sizeof(float));
  }

  // The scratch: the inputs of each token of the turn, then partial sums [tokens, slices, panels, rows of the slice].
  static std::size_t stride(const Header& h) { return round_up(Kernel::input_bytes(h), kAlignment); }
  static std::byte* inputs(const Product& p, std::int64_t token) {
    return p.scratch + stride(p.weights->header) * static_cast<std::size_t>(token);
  }
  static float* partials(const Product& p, const Turn& turn, std::int64_t token, std::uint32_t slice) {
    const Header& h = p.weights->header;
    auto* all = reinterpret_cast<float*>(inputs(p, turn.most));
    return all + token * h.rows * h.panels + std::size_t{slice} * h.slice_rows * h.panels;
  }
  static bool sums_are_serial(const Header& h, std::int64_t tokens) {
    return tokens * h.rows * h.panels <= kSerialSums;
  }

  static void multiply_item(const Product& p, const Turn& turn, std::int64_t item) {
    const std::int64_t panels = p.weights->header.panels, units = p.weights->header.slices * panels;
    const std::int64_t unit = item % units, first = item / units * kItemTokens;
    const auto slice = static_cast<std::uint32_t>(unit / panels), panel = static_cast<std::uint32_t>(unit % panels);
    multiply_tokens<Kernel::kTokens>(p, turn, slice, panel, first, std::min(first + kItemTokens, turn.count));
  }

  // The unit stays in the cache while its tokens take turns.
  template <int kCount>
  static void multiply_tokens(const Product& p, const Turn& turn, std::uint32_t slice, std::uint32_t panel,
                              std::int64_t token, std::int64_t end) {
    for (; token + kCount <= end; token += kCount) multiply_unit<kCount>(p, turn, slice, panel, token);
    if constexpr (kCount > 1) multiply_tokens<kCount / 2>(p, turn, slice, panel, token, end);
  }

  template <int kCount>
  static void multiply_unit(const Product& p, const Turn& turn, std::uint32_t slice, std::uint32_t panel,
                            std::int64_t first) {
    const Header& h = p.weights->header;
    std::byte* of_tokens[kCount];
    for (int t = 0; t < kCount; ++t) of_tokens[t] = inputs(p, first + t);
    alignas(64) float sums[kCount][kMaxRows];
    Kernel::template multiply<kCount>(*p.weights, slice, panel, of_tokens, sums);
    for (int t = 0; t < kCount; ++t) {
      if (h.panels == 1) {
        finish<F>(*p.weights, slice, sums[t], p.y + (turn.first + first + t) * outputs(h));
      } else {
        const std::uint32_t rows = rows_of(h, slice);
        std::memcpy(partials(p, turn, first + t, slice) + std::size_t{panel} * rows, sums[t], rows * sizeof(float));
      }
    }
  }

  static void add_panels(const Product& p, const Turn& turn, std::uint32_t slice) {
    const Header& h = p.weights->header;
    const std::uint32_t rows = rows_of(h, slice);
    for (std::int64_t token = 0; token < turn.count; ++token) {
      const float* from = partials(p, turn, token, slice);
      float sums[kMaxRows];
      std::memcpy(sums, from, rows * sizeof(float));
      for (std::uint32_t panel = 1; panel < h.panels; ++panel) {
        for (std::uint32_t i = 0; i < rows; ++i) sums[i] += from[std::size_t{panel} * rows + i];
      }
      finish<F>(*p.weights, slice, sums, p.y + (turn.first + token) * outputs(h));
    }
  }
};

}  // namespace
}  // namespace owl
