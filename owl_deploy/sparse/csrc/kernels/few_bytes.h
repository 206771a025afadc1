// Few tokens and 8-bit weights: a row's weights are expanded by their mask, if they have one, and multiplied with
// 24-bit inputs in exact integer arithmetic.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/kernel.h"

namespace owl {
namespace {

constexpr std::uint32_t kFlushBlocks = 32;   // products are summed in 32 bits over no more of them
constexpr float kInputLevels = 8388607;      // the largest 24-bit input
constexpr float kSmallestScale = 0x1p-100f;  // inputs all below it share it: 1 / scale must be a number, too

template <class Isa, OfBytes F>
struct FewKernel<Isa, F> {
  static constexpr int kTokens = 4;

  // 24-bit integers, padded to whole blocks, and the scale behind them.
  static std::size_t input_bytes(const Header& h) { return scale_offset(h) + sizeof(float); }

  static void prepare(const Header& h, const float* x, std::byte* inputs) {
    // The largest magnitude, by its bits: integers that a compiler can compare 16 at a time, and NaN is the largest.
    std::uint32_t largest = std::bit_cast<std::uint32_t>(kSmallestScale);
    for (std::uint32_t c = 0; c < h.columns; ++c) {
      largest = std::max(largest, std::bit_cast<std::uint32_t>(x[c]) & 0x7FFFFFFFu);
    }
    const float peak = std::bit_cast<float>(largest);
    // 24 bits are what a float has: even beside the largest outlier, inputs lose no more than fp32 sums do.
    const float inverse = std::isfinite(peak) ? kInputLevels / peak : 0.0f;
    *scale(h, inputs) = std::isfinite(peak) ? peak / kInputLevels : std::numeric_limits<float>::quiet_NaN();
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

  template <int kCount>
  static void multiply(const Packed& packed, std::uint32_t slice, std::uint32_t /*panel*/, std::byte* const* inputs,
                       float (*sums)[kMaxRows]) {
    const Header& h = packed.header;
    const Unit unit = unit_of(packed, slice, 0);
    const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of<F>(h, 0);
    const auto* masks = reinterpret_cast<const std::uint64_t*>(unit.begin);
    const auto* values = reinterpret_cast<const std::int8_t*>(unit.begin + values_offset<F>(rows, blocks));
    const auto* const last = last_values<std::int8_t>(packed);
    float scales[kCount];
    for (int t = 0; t < kCount; ++t) scales[t] = *scale(h, inputs[t]);
    const std::int32_t* weight_sums = packed.sums + std::size_t{slice} * h.slice_rows;
    constexpr int kSums = kRowsTogether * kCount;  // two rows at once: one's additions fill the waits of the other's
    for (std::uint32_t row = 0; row < rows; row += kRowsTogether) {
      std::int64_t total[kSums] = {};
      for (std::uint32_t block = 0; block < blocks;) {
        const std::uint32_t end = std::min(blocks, block + kFlushBlocks);
        const std::int8_t* next = values;
        // Masks may have been rewritten since they were checked. Where they could lead out of the matrix, what is left
        // of it is copied to where they cannot.
        LastValues copy;
        if constexpr (F::kMasked) {
          if (last - values < (end - block) * kRowsTogether * kMaskColumns) [[unlikely]] {
            copy_last(copy, values, last);
            next = copy;
          }
        }
        const std::int8_t* const first = next;
        const auto next_weights = [&] {
          if constexpr (F::kMasked) {
            const std::uint64_t& mask = *masks++;
            const auto weights = Isa::expand(mask, next);
            next += std::popcount(mask);
            return weights;
          } else {
            next += kMaskColumns;
            return Isa::load8(next - kMaskColumns);
          }
        };
        typename Isa::Sum sum[kSums];
        unrolled<kSums>([&](auto i) { sum[i] = Isa::zero_sum(); });
        for (; block < end; ++block) {
          Isa::prefetch(next);
          if constexpr (F::kMasked) {
            Isa::prefetch(masks);
          } else {
            Isa::prefetch(next + kMaskColumns);
          }
          unrolled<kRowsTogether>([&](auto r) {
            const auto weights = next_weights();
            unrolled<kCount>([&](auto t) { Isa::add_product(sum[r * kCount + t], weights, inputs[t], block); });
          });
        }
        unrolled<kSums>([&](auto i) { total[i] += Isa::total(sum[i]); });
        values = F::kMasked ? advanced(values, next - first, last) : next;
      }
      for (std::uint32_t r = 0; r < kRowsTogether && row + r < rows; ++r) {
        for (int t = 0; t < kCount; ++t) {
          const std::int64_t sum = total[r * kCount + t] - Isa::kInputOffset * weight_sums[row + r];
          sums[t][row + r] = static_cast<float>(sum) * scales[t];
        }
      }
    }
  }

 private:
  using LastValues = std::int8_t[kRowsTogether * kFlushBlocks * kMaskColumns + kOverread];

  [[gnu::noinline]] static void copy_last(LastValues& copy, const std::int8_t* values, const std::int8_t* last) {
    const std::size_t left = static_cast<std::size_t>(last - values) + kOverread;
    std::memcpy(copy, values, left);
    std::memset(copy + left, 0, sizeof(copy) - left);
  }
  static std::size_t scale_offset(const Header& h) {
    return round_up(std::size_t{padded_columns<F>(h)} * kInputBytes, kAlignment);
  }
  static float* scale(const Header& h, std::byte* inputs) {
    return reinterpret_cast<float*>(inputs + scale_offset(h));
  }
};

}  // namespace
}  // namespace owl
