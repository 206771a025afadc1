// The kernels, written once. An instruction set is a class of a few operations on 16 lanes (isa_*.h); everything here
// is a template over it, and is compiled in one translation unit for each (kernels_*.cpp).
//
// Few tokens (decode): a unit's weights go through registers once for up to four tokens. Of the packed formats a
// register holds one weight for each of 16 rows, and is its own index into the 32 inputs of the block. Of the 8-bit
// formats a row's weights are expanded by their mask and multiplied with 24-bit inputs, in exact integer arithmetic.
//
// Many tokens (prefill): inputs are transposed to [columns, tokens], and each weight multiplies a row of them, so that
// registers hold one output for 16 tokens each and every format has the same inner loop.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "layout.h"

namespace owl {
namespace {

constexpr std::int64_t kTileTokens = 128;       // most of a tile; its 32 rows of a block of inputs fit in L1
constexpr std::uint32_t kFlushColumns = 2048;   // 8-bit products are summed in 32 bits over no more of them
constexpr std::int64_t kTransposed = 256;       // columns that one item of the first stage transposes
constexpr std::int64_t kSerialSums = 1 << 15;   // partial sums that are not worth another thread
constexpr float kInputLevels = 8388607;          // the largest 24-bit input of an 8-bit product
constexpr float kSmallestScale = 0x1p-100f;      // inputs all below it share it: 1 / scale must be a number, too
constexpr int kFewTokens = 4;                   // that go through the units together

// f(0) … f(kCount - 1), written out: arrays that only such loops index can live in registers.
template <int kCount, class F>
[[gnu::always_inline]] inline void unrolled(F&& f) {
  if constexpr (kCount > 0) {
    unrolled<kCount - 1>(f);
    f(std::integral_constant<int, kCount - 1>{});
  }
}

// ---- What is in the scratch memory ----

// Many tokens: the inputs, transposed, tile by tile.
struct Tiles {
  std::int64_t count, tokens;  // of each tile, a multiple of 16
  std::int64_t columns;

  Tiles(const Header& h, std::int64_t all) {
    count = ceil_div(all, kTileTokens);
    tokens = round_up(ceil_div(all, count), std::int64_t{kLanes});
    columns = padded_columns(h);
  }
  std::size_t bytes() const { return static_cast<std::size_t>(count * tokens * columns) * sizeof(float); }
};

// Many tokens: the slices that one item takes together, so that a block of inputs stays in L1 for 256 rows or so.
struct Slices {
  std::uint32_t first, end;

  Slices(const Header& h, std::int64_t item) {
    first = static_cast<std::uint32_t>(item) * together(h);
    end = std::min(first + together(h), h.slices);
  }
  static std::uint32_t together(const Header& h) { return is_packed(h.format) ? 1 : kMaxRows / h.slice_rows; }
  static std::int64_t items(const Header& h) { return ceil_div(h.slices, together(h)); }
};

// Few tokens: their inputs, padded to whole blocks (packed) or in 24 bits with a scale (8-bit); partial sums by panel.
struct Inputs {
  std::size_t stride, partials;  // bytes of a token's inputs, and of all partial sums

  Inputs(const Header& h, std::int64_t tokens) {
    const std::size_t width = is_packed(h.format) ? sizeof(float) : kInputBytes;
    stride = round_up(padded_columns(h) * width, kAlignment) + kAlignment;  // the scale lies behind them
    partials = h.panels == 1 ? 0 : static_cast<std::size_t>(tokens) * h.rows * h.panels * sizeof(float);
  }
  std::size_t bytes(std::int64_t tokens) const { return stride * static_cast<std::size_t>(tokens) + partials; }
  static float* scale_of(std::byte* inputs, const Header& h) {
    return reinterpret_cast<float*>(inputs + round_up(std::size_t{padded_columns(h)} * kInputBytes, kAlignment));
  }
};

// ---- Outputs ----

// e^x in plain arithmetic, to 2 units in the last place, so that a compiler can vectorise a loop of it.
inline float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kRound = 12582912.0f;
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float rounded = x * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const std::uint32_t power = (std::bit_cast<std::uint32_t>(rounded) << 23) + 0x3F800000u;
  return p * std::bit_cast<float>(power);
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// From a slice's sums to outputs.
inline void finish(const Packed& packed, std::uint32_t slice, const float* sums, float* y) {
  const Header& h = *packed.header;
  const std::uint32_t rows = rows_of(h, slice);
  float scaled[kMaxRows];
  if (packed.scales != nullptr) {
    const float* scales = packed.scales + std::size_t{slice} * h.slice_rows;
    for (std::uint32_t i = 0; i < rows; ++i) scaled[i] = sums[i] * scales[i];
    sums = scaled;
  }
  if (h.paired) {
    const std::uint32_t half = rows / 2;
    float* out = y + std::size_t{slice} * (h.slice_rows / 2);
    for (std::uint32_t i = 0; i < half; ++i) out[i] = silu(sums[i]) * sums[half + i];
  } else {
    std::memcpy(y + std::size_t{slice} * h.slice_rows, sums, rows * sizeof(float));
  }
}

// ---- Few tokens ----

template <class Isa, class Word, int kTokens>
void packed_unit(const Packed& packed, std::uint32_t slice, std::uint32_t panel, const float* const* inputs,
                 float (*sums)[kMaxRows]) {
  const Header& h = *packed.header;
  const std::uint8_t* unit = packed.data + packed.units[std::size_t{slice} * h.panels + panel];
  const std::uint32_t groups = groups_of(rows_of(h, slice)), blocks = blocks_of(h, panel);
  const auto* words = reinterpret_cast<const Word*>(unit + words_offset(groups, blocks));
  alignas(64) float buffers[2][kTokens][kMaxRows];  // the rows' sums, as the last block and as this one orders them
  std::memset(buffers[0], 0, sizeof(buffers[0]));
  const std::uint8_t* record = unit;
  for (std::uint32_t block = 0; block < blocks; ++block, record += record_bytes(groups)) {
    const auto& from = buffers[block % 2];
    auto& to = buffers[1 - block % 2];
    typename Isa::Table table[kTokens];
    unrolled<kTokens>([&](auto t) { table[t] = Isa::table(inputs[t] + std::size_t{block} * kBlockColumns); });
    for (std::uint32_t group = 0; group < groups; ++group) {
      const std::uint8_t* places = record + groups + std::size_t{group} * kLanes;
      typename Isa::Lanes sum[kTokens];
      unrolled<kTokens>([&](auto t) { sum[t] = Isa::gather(from[t], places); });
      const std::uint32_t steps = record[group];
      for (std::uint32_t step = 0; step < steps; ++step, words += kLanes) {
        Isa::prefetch(words);
        const auto word = Isa::load_words(words);
        const auto weight = Isa::template weight<Word>(word);
        unrolled<kTokens>([&](auto t) { sum[t] = Isa::multiply_add(weight, Isa::lookup(table[t], word), sum[t]); });
      }
      unrolled<kTokens>([&](auto t) { Isa::store(to[t] + std::size_t{group} * kLanes, sum[t]); });
    }
  }
  for (std::uint32_t group = 0; group < groups; ++group) {
    for (int t = 0; t < kTokens; ++t) {
      Isa::store(sums[t] + std::size_t{group} * kLanes,
                 Isa::gather(buffers[blocks % 2][t], record + std::size_t{group} * kLanes));
    }
  }
}

template <class Isa, bool kMasked, int kTokens>
void int8_unit(const Packed& packed, std::uint32_t slice, std::byte* const* inputs, float (*sums)[kMaxRows]) {
  const Header& h = *packed.header;
  const std::uint8_t* unit = packed.data + packed.units[slice];
  const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of(h, 0);
  const auto* masks = reinterpret_cast<const std::uint64_t*>(unit);
  const auto* values = reinterpret_cast<const std::int8_t*>(unit + values_offset(h, rows));
  const std::int32_t* weight_sums = packed.sums + std::size_t{slice} * h.slice_rows;
  const auto next = [&] {
    if constexpr (kMasked) {
      const std::uint64_t mask = *masks++;
      const auto weights = Isa::expand(mask, values);
      values += std::popcount(mask);
      return weights;
    } else {
      values += kMaskColumns;
      return Isa::load8(values - kMaskColumns);
    }
  };
  constexpr int kSums = kRowsTogether * kTokens;  // two rows at once: one's additions fill the waits of the other's
  for (std::uint32_t row = 0; row < rows; row += kRowsTogether) {
    std::int64_t total[kSums] = {};
    for (std::uint32_t block = 0; block < blocks;) {
      typename Isa::Sum sum[kSums];
      unrolled<kSums>([&](auto i) { sum[i] = Isa::zero_sum(); });
      const std::uint32_t end = std::min(blocks, block + kFlushColumns / kMaskColumns);
      for (; block < end; ++block) {
        Isa::prefetch(values);
        if constexpr (kMasked) {
          Isa::prefetch(masks);
        } else {
          Isa::prefetch(values + kMaskColumns);
        }
        unrolled<kRowsTogether>([&](auto r) {
          const auto weights = next();
          unrolled<kTokens>([&](auto t) { Isa::add_product(sum[r * kTokens + t], weights, inputs[t], block); });
        });
      }
      unrolled<kSums>([&](auto i) { total[i] += Isa::total(sum[i]); });
    }
    for (std::uint32_t r = 0; r < kRowsTogether && row + r < rows; ++r) {
      for (int t = 0; t < kTokens; ++t) {
        const std::int64_t sum = total[r * kTokens + t] - Isa::kInputOffset * weight_sums[row + r];
        sums[t][row + r] = static_cast<float>(sum) * *Inputs::scale_of(inputs[t], h);
      }
    }
  }
}

// Inputs of one token as the unit kernels read them.
template <class Isa>
void prepare(const Header& h, const float* x, std::byte* inputs) {
  if (is_packed(h.format)) {
    std::memcpy(inputs, x, h.columns * sizeof(float));
    std::memset(inputs + h.columns * sizeof(float), 0, (padded_columns(h) - h.columns) * sizeof(float));
    return;
  }
  // The largest magnitude, by its bits: integers that a compiler can compare 16 at a time, and NaN is the largest.
  std::uint32_t largest = std::bit_cast<std::uint32_t>(kSmallestScale);
  for (std::uint32_t c = 0; c < h.columns; ++c) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(x[c]) & 0x7FFFFFFFu);
  }
  const float peak = std::bit_cast<float>(largest);
  // 24 bits are what a float has: even beside the largest outlier, inputs lose no more than fp32 sums do.
  const float inverse = std::isfinite(peak) ? kInputLevels / peak : 0.0f;
  *Inputs::scale_of(inputs, h) = std::isfinite(peak) ? peak / kInputLevels : std::numeric_limits<float>::quiet_NaN();
  for (std::uint32_t c = 0; c < h.columns; c += kMaskColumns) {
    alignas(64) float values[kMaskColumns] = {};
    alignas(64) std::int32_t quantised[kMaskColumns];
    if (inverse != 0) std::memcpy(values, x + c, std::min(kMaskColumns, h.columns - c) * sizeof(float));
    for (std::uint32_t i = 0; i < kMaskColumns; ++i) {
      const float level = std::nearbyint(values[i] * inverse);
      quantised[i] = static_cast<std::int32_t>(std::min(std::max(level, -kInputLevels), kInputLevels));
    }
    Isa::store_inputs(inputs, c / kMaskColumns, quantised);
  }
}

template <class Isa, int kTokens>
void few_tokens_unit(const Product& p, std::uint32_t slice, std::uint32_t panel, std::int64_t first) {
  const Packed& packed = *p.weights;
  const Header& h = *packed.header;
  const Inputs layout(h, p.tokens);
  std::byte* inputs[kTokens];
  const float* values[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    inputs[t] = p.scratch + layout.stride * static_cast<std::size_t>(first + t);
    values[t] = reinterpret_cast<const float*>(inputs[t]) + std::size_t{panel} * h.panel_columns;
  }
  alignas(64) float sums[kTokens][kMaxRows];
  switch (h.format) {
    case Format::packed32: packed_unit<Isa, std::uint32_t, kTokens>(packed, slice, panel, values, sums); break;
    case Format::packed16: packed_unit<Isa, std::uint16_t, kTokens>(packed, slice, panel, values, sums); break;
    case Format::int8: int8_unit<Isa, true, kTokens>(packed, slice, inputs, sums); break;
    case Format::dense8: int8_unit<Isa, false, kTokens>(packed, slice, inputs, sums); break;
  }
  auto* partials = reinterpret_cast<float*>(p.scratch + layout.stride * static_cast<std::size_t>(p.tokens));
  for (int t = 0; t < kTokens; ++t) {
    if (h.panels == 1) {
      finish(packed, slice, sums[t], p.y + (first + t) * outputs(packed));
    } else {  // [tokens, slices, panels, rows of the slice]
      float* to = partials + (first + t) * h.rows * h.panels + std::size_t{slice} * h.slice_rows * h.panels;
      std::memcpy(to + std::size_t{panel} * rows_of(h, slice), sums[t], rows_of(h, slice) * sizeof(float));
    }
  }
}

template <class Isa>
void few_tokens_item(const Product& p, std::int64_t item) {
  const auto panels = static_cast<std::int64_t>(p.weights->header->panels);
  const auto slice = static_cast<std::uint32_t>(item / panels), panel = static_cast<std::uint32_t>(item % panels);
  std::int64_t token = 0;  // the unit stays in the cache while its tokens take turns
  for (; token + kFewTokens <= p.tokens; token += kFewTokens) {
    few_tokens_unit<Isa, kFewTokens>(p, slice, panel, token);
  }
  for (; token + 2 <= p.tokens; token += 2) few_tokens_unit<Isa, 2>(p, slice, panel, token);
  for (; token < p.tokens; ++token) few_tokens_unit<Isa, 1>(p, slice, panel, token);
}

inline void add_panels(const Product& p, std::uint32_t slice) {
  const Header& h = *p.weights->header;
  const Inputs layout(h, p.tokens);
  const std::uint32_t rows = rows_of(h, slice);
  const auto* partials = reinterpret_cast<const float*>(p.scratch + layout.stride * static_cast<std::size_t>(p.tokens));
  for (std::int64_t token = 0; token < p.tokens; ++token) {
    const float* from = partials + token * h.rows * h.panels + std::size_t{slice} * h.slice_rows * h.panels;
    float sums[kMaxRows];
    std::memcpy(sums, from, rows * sizeof(float));
    for (std::uint32_t panel = 1; panel < h.panels; ++panel) {
      for (std::uint32_t i = 0; i < rows; ++i) sums[i] += from[std::size_t{panel} * rows + i];
    }
    finish(*p.weights, slice, sums, p.y + token * outputs(*p.weights));
  }
}

// ---- Many tokens ----

// Bytes as floats, by their bits: a broadcast from memory is one load, a conversion would take turns with the products.
constexpr auto kFloats = [] {
  struct Table {
    float of[256];
  } table{};
  for (int i = 0; i < 256; ++i) table.of[i] = static_cast<float>(static_cast<std::int8_t>(i));
  return table;
}();

inline void transpose(const Product& p, std::int64_t item) {
  const Header& h = *p.weights->header;
  const Tiles tiles(h, p.tokens);
  const std::int64_t pieces = ceil_div(tiles.columns, kTransposed);
  const std::int64_t tile = item / pieces, first = item % pieces * kTransposed;
  const std::int64_t end = std::min(first + kTransposed, tiles.columns);
  float* to = reinterpret_cast<float*>(p.scratch) + tile * tiles.tokens * tiles.columns;
  const std::int64_t begin = tile * tiles.tokens, count = std::min(tiles.tokens, p.tokens - begin);
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

// Row by row: sums[0 .. kVectors * 16) += weights times rows of `x`. `next(column, weight)` gives the weights.
template <class Isa, int kVectors, class Next>
inline void add_row(float* sums, const float* x, std::int64_t stride, Next next) {
  typename Isa::Lanes sum[kVectors];
  unrolled<kVectors>([&](auto v) { sum[v] = Isa::load(sums + v * kLanes); });
  std::uint32_t column;
  float weight;
  while (next(column, weight)) {
    const float* inputs = x + column * stride;
    const auto w = Isa::broadcast(weight);
    unrolled<kVectors>([&](auto v) { sum[v] = Isa::multiply_add(w, Isa::load(inputs + v * kLanes), sum[v]); });
  }
  unrolled<kVectors>([&](auto v) { Isa::store(sums + v * kLanes, sum[v]); });
}

template <class Isa, int kMost, class Make>
inline void add_some(std::int64_t count, float* sums, const float* x, std::int64_t stride, Make make) {
  if (count == kMost) {
    add_row<Isa, kMost>(sums, x, stride, make());
  } else if constexpr (kMost > 1) {
    add_some<Isa, kMost - 1>(count, sums, x, stride, make);
  }
}

// All vectors of a tile, as many at a time as the registers hold.
template <class Isa, class Make>
inline void add_rows(float* sums, const float* x, std::int64_t stride, Make make) {
  std::int64_t left = stride / kLanes;
  for (; left > Isa::kVectors; left -= Isa::kVectors, sums += Isa::kVectors * kLanes, x += Isa::kVectors * kLanes) {
    add_row<Isa, Isa::kVectors>(sums, x, stride, make());
  }
  add_some<Isa, Isa::kVectors>(left, sums, x, stride, make);
}

template <class Isa, class Word>
void packed_tile(const Packed& packed, std::uint32_t slice, const float* x, std::int64_t stride, float* sums) {
  const Header& h = *packed.header;
  const std::uint32_t groups = groups_of(rows_of(h, slice));
  for (std::uint32_t panel = 0; panel < h.panels; ++panel) {
    const std::uint8_t* unit = packed.data + packed.units[std::size_t{slice} * h.panels + panel];
    const std::uint32_t blocks = blocks_of(h, panel);
    const auto* words = reinterpret_cast<const Word*>(unit + words_offset(groups, blocks));
    std::uint8_t order[2][kMaxRows];  // the row at each place, in the last block and in this one
    for (std::uint32_t i = 0; i < kMaxRows; ++i) order[0][i] = static_cast<std::uint8_t>(i);
    for (std::uint32_t block = 0; block < blocks; ++block) {
      const std::uint8_t* record = unit + std::size_t{block} * record_bytes(groups);
      const std::uint8_t* before = order[block % 2];
      std::uint8_t* now = order[1 - block % 2];
      for (std::uint32_t group = 0; group < groups; ++group) {
        const std::uint32_t steps = record[group];
        for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
          const std::uint32_t place = group * kLanes + lane;
          now[place] = before[record[groups + place]];
          const Word* lane_words = words + lane;
          add_rows<Isa>(sums + now[place] * stride, x, stride, [=] {
            return [at = lane_words, end = lane_words + std::size_t{steps} * kLanes](std::uint32_t& column,
                                                                                  float& weight) mutable {
              if (at == end) return false;  // padding is multiplied, too: equal counts let the CPU foresee the end
              column = *at % kBlockColumns;
              if constexpr (sizeof(Word) == 4) {
                weight = std::bit_cast<float>(*at);
              } else {
                weight = static_cast<float>(static_cast<std::int16_t>(*at) >> 5);
              }
              at += kLanes;
              return true;
            };
          });
        }
        words += std::size_t{steps} * kLanes;
      }
      x += kBlockColumns * stride;
    }
  }
}

template <class Isa>
void int8_tile(const Packed& packed, Slices slices, const float* x, std::int64_t stride, float* sums) {
  const Header& h = *packed.header;
  const std::uint32_t blocks = blocks_of(h, 0);
  struct Pair {
    const std::uint64_t* masks;  // of both rows, in the block that is next
    const std::int8_t* values;
  } pairs[kMaxRows / kRowsTogether];
  std::uint32_t count = 0;
  for (std::uint32_t slice = slices.first; slice < slices.end; ++slice) {
    const auto* masks = reinterpret_cast<const std::uint64_t*>(packed.data + packed.units[slice]);
    const std::uint32_t in_slice = stored_rows(rows_of(h, slice)) / kRowsTogether;
    const auto* values = reinterpret_cast<const std::int8_t*>(masks + std::size_t{in_slice} * kRowsTogether * blocks);
    for (std::uint32_t pair = 0; pair < in_slice; ++pair) {
      pairs[count++] = {masks, values};
      for (std::uint32_t i = 0; i < blocks * kRowsTogether; ++i) values += std::popcount(*masks++);
    }
  }
  for (std::uint32_t block = 0; block < blocks; ++block, x += kMaskColumns * stride) {
    for (std::uint32_t i = 0; i < count * kRowsTogether; ++i) {
      Pair& pair = pairs[i / kRowsTogether];
      const std::uint64_t mask = *pair.masks++;
      add_rows<Isa>(sums + i * stride, x, stride, [at = pair.values, mask] {
        return [at, bits = mask](std::uint32_t& column, float& weight) mutable {
          if (bits == 0) return false;
          column = static_cast<std::uint32_t>(std::countr_zero(bits));
          bits &= bits - 1;
          weight = kFloats.of[static_cast<std::uint8_t>(*at++)];
          return true;
        };
      });
      pair.values += std::popcount(mask);
    }
  }
}

// Two rows of dense weights at a time: an input is loaded once for both.
template <class Isa, int kVectors>
inline void add_two_rows(float* sums, const float* x, std::int64_t stride, const std::int8_t* const* weights) {
  typename Isa::Lanes sum[2][kVectors];
  unrolled<2 * kVectors>([&](auto i) {
    constexpr int row = i / kVectors, v = i % kVectors;
    sum[row][v] = Isa::load(sums + row * stride + v * kLanes);
  });
  for (std::uint32_t column = 0; column < kBlockColumns; ++column, x += stride) {
    const auto first = Isa::broadcast(kFloats.of[static_cast<std::uint8_t>(weights[0][column])]);
    const auto second = Isa::broadcast(kFloats.of[static_cast<std::uint8_t>(weights[1][column])]);
    unrolled<kVectors>([&](auto v) {
      const auto inputs = Isa::load(x + v * kLanes);
      sum[0][v] = Isa::multiply_add(first, inputs, sum[0][v]);
      sum[1][v] = Isa::multiply_add(second, inputs, sum[1][v]);
    });
  }
  unrolled<2 * kVectors>([&](auto i) {
    constexpr int row = i / kVectors, v = i % kVectors;
    Isa::store(sums + row * stride + v * kLanes, sum[row][v]);
  });
}

template <class Isa, int kMost>
inline void add_row_pairs(float* sums, const float* x, std::int64_t stride, std::int64_t left,
                          const std::int8_t* const* weights) {
  for (; left >= kMost; left -= kMost, sums += kMost * kLanes, x += kMost * kLanes) {
    add_two_rows<Isa, kMost>(sums, x, stride, weights);
  }
  if constexpr (kMost > 1) add_row_pairs<Isa, kMost / 2>(sums, x, stride, left, weights);
}

template <class Isa>
void dense8_tile(const Packed& packed, Slices slices, const float* x, std::int64_t stride, float* sums) {
  const Header& h = *packed.header;
  const std::uint32_t columns = padded_columns(h);
  for (std::uint32_t column = 0; column < columns; column += kBlockColumns, x += kBlockColumns * stride) {
    float* to = sums;
    for (std::uint32_t slice = slices.first; slice < slices.end; ++slice) {
      const auto* values = reinterpret_cast<const std::int8_t*>(packed.data + packed.units[slice]);
      for (std::uint32_t row = 0; row < rows_of(h, slice); row += kRowsTogether, to += kRowsTogether * stride) {
        const std::size_t block = std::size_t{row} * columns + column / kMaskColumns * kRowsTogether * kMaskColumns;
        const std::int8_t* first = values + block + column % kMaskColumns;
        const std::int8_t* const pair[kRowsTogether] = {first, first + kMaskColumns};
        add_row_pairs<Isa, Isa::kPairVectors>(to, x, stride, stride / kLanes, pair);
      }
    }
  }
}

template <class Isa>
void many_tokens_item(const Product& p, std::int64_t item) {
  const Packed& packed = *p.weights;
  const Header& h = *packed.header;
  const Tiles tiles(h, p.tokens);
  const Slices slices(h, item / tiles.count);
  const std::int64_t tile = item % tiles.count;
  const float* x = reinterpret_cast<const float*>(p.scratch) + tile * tiles.tokens * tiles.columns;
  alignas(64) float sums[kMaxRows * kTileTokens];
  std::memset(sums, 0, static_cast<std::size_t>(kMaxRows * tiles.tokens) * sizeof(float));
  switch (h.format) {
    case Format::packed32: packed_tile<Isa, std::uint32_t>(packed, slices.first, x, tiles.tokens, sums); break;
    case Format::packed16: packed_tile<Isa, std::uint16_t>(packed, slices.first, x, tiles.tokens, sums); break;
    case Format::int8: int8_tile<Isa>(packed, slices, x, tiles.tokens, sums); break;
    case Format::dense8: dense8_tile<Isa>(packed, slices, x, tiles.tokens, sums); break;
  }
  const std::int64_t first = tile * tiles.tokens, count = std::min(tiles.tokens, p.tokens - first);
  for (std::uint32_t slice = slices.first; slice < slices.end; ++slice) {
    const float* of_slice = sums + (slice - slices.first) * h.slice_rows * tiles.tokens;
    for (std::int64_t t = 0; t < count; t += kLanes) {
      const std::int64_t width = std::min<std::int64_t>(kLanes, count - t);
      alignas(64) float columns[kLanes][kMaxRows];
      for (std::uint32_t row = 0; row < rows_of(h, slice); ++row) {
        for (std::int64_t j = 0; j < width; ++j) columns[j][row] = of_slice[row * tiles.tokens + t + j];
      }
      for (std::int64_t j = 0; j < width; ++j) {
        finish(packed, slice, columns[j], p.y + (first + t + j) * outputs(packed));
      }
    }
  }
}

// ---- The stages ----

template <class Isa>
void run_stage(const Product& p, int stage, std::int64_t item) {
  const Header& h = *p.weights->header;
  if (Isa::kManyTokens.are(h, p.tokens)) {
    if (stage == 0) transpose(p, item);
    if (stage == 1) many_tokens_item<Isa>(p, item);
    return;
  }
  if (stage == 0) {
    const Inputs layout(h, p.tokens);
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      prepare<Isa>(h, p.x + t * h.columns, p.scratch + layout.stride * static_cast<std::size_t>(t));
    }
  }
  if (stage == 1) few_tokens_item<Isa>(p, item);
  if (stage == 2) {
    const bool serial = p.tokens * h.rows * h.panels <= kSerialSums;
    const auto first = static_cast<std::uint32_t>(serial ? 0 : item);
    const std::uint32_t end = serial ? h.slices : first + 1;
    for (std::uint32_t slice = first; slice < end; ++slice) add_panels(p, slice);
  }
}

}  // namespace
}  // namespace owl
