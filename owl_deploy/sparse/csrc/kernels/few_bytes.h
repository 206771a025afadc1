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

constexpr std::uint32_t kFlushBlocks = 32;   // products are summed in 32 bits over no more of them …
constexpr std::uint32_t kKeptBlocks = 1024;  // … and then kept, for 16 rows to be added up together, over these
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
    const std::int32_t* weight_sums = packed.sums + std::size_t{slice} * h.slice_rows;
    for (std::uint32_t first = 0; first < rows; first += kLanes) {
      const std::uint32_t count = std::min(kLanes, stored_rows(rows) - first);
      std::int64_t total[kCount][kLanes] = {};
      typename Isa::RowSums of_rows[kCount];
      if (count < kLanes) std::memset(static_cast<void*>(of_rows), 0, sizeof(of_rows));
      for (std::uint32_t row = 0; row < count; row += kRowsTogether) {
        for (std::uint32_t block = 0; block < blocks;) {
          const std::uint32_t begin = block, end = std::min(blocks, block + kFlushBlocks);
          const std::int8_t* next = values;
          // Masks may have been rewritten since they were checked. Where they could lead out of the matrix, what is
          // left of it is copied to where they cannot.
          LastValues copy;
          if constexpr (F::kMasked) {
            if (last - values < (end - block) * kRowsTogether * kMaskColumns) [[unlikely]] {
              copy_last(copy, values, last);
              next = copy;
            }
          }
          const std::int8_t* const first_value = next;
          constexpr int kSums = kRowsTogether * kCount;  // two rows: one's additions fill the waits of the other's
          typename Isa::Sum sum[kSums];
          unrolled<kSums>([&](auto i) { sum[i] = Isa::zero_sum(); });
          for (; block < end; ++block) {
            Isa::prefetch(next);
            if constexpr (F::kMasked) {
              Isa::prefetch(masks);
            } else {
              Isa::prefetch(next + kMaskColumns);
            }
            typename Isa::Weights8 weights[kRowsTogether];
            unrolled<kRowsTogether>([&](auto r) {
              if constexpr (F::kMasked) {
                weights[r] = Isa::expand(masks[r], next);
                next += std::popcount(masks[r]);
              } else {
                weights[r] = Isa::load8(next);
                next += kMaskColumns;
              }
            });
            if constexpr (F::kMasked) masks += kRowsTogether;
            unrolled<kCount>([&](auto t) {
              const auto x = Isa::load_inputs(inputs[t], block);
              unrolled<kRowsTogether>([&](auto r) { Isa::add_product(sum[r * kCount + t], weights[r], x); });
            });
          }
          unrolled<kSums>([&](auto i) {
            constexpr int r = i / kCount, t = i % kCount;
            if (begin < kKeptBlocks) {
              Isa::keep(of_rows[t], row + r, sum[i], begin == 0);
            } else {
              total[t][row + r] += Isa::total(sum[i]);
            }
          });
          values = F::kMasked ? advanced(values, next - first_value, last) : next;
        }
      }
      for (int t = 0; t < kCount; ++t) {
        Isa::add_kept(of_rows[t], total[t]);
        const float input_scale = *scale(h, inputs[t]);
        for (std::uint32_t i = 0; i < std::min(kLanes, rows - first); ++i) {
          const std::int64_t sum = total[t][i] - Isa::kInputOffset * weight_sums[first + i];
          sums[t][first + i] = static_cast<float>(sum) * input_scale;
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
