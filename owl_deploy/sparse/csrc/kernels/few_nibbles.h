// 4-bit weights and any number of tokens: integers of 16 rows at once, four columns in each lane, are multiplied with
// inputs of 16 bits in exact arithmetic. Each row's sum over a group of columns is a whole number that fp32 holds.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/kernel.h"

namespace owl {
namespace {

constexpr float kGroupInputLevels = 32639;   // the largest input: 127 * 256 + 127, so that both bytes have a sign
constexpr std::uint32_t kLine = 64;          // bytes: each tile prefetches one; a record has not many more
constexpr float kSmallestPeak = 0x1p-80f;    // groups of inputs all below it share its scale

// The inputs of a group: 16-bit integers as their upper and their lower bytes, -128 to 127 each.
struct GroupInputs {
  std::int8_t upper[kGroupColumns], lower[kGroupColumns];
};

// What goes with a group of inputs.
struct GroupScale {
  float scale;
  std::int32_t sum;  // of its integers
};

template <class Isa, OfNibbles F>
struct FewKernel<Isa, F> {
  static constexpr int kTokens = Isa::kTokensOfNibbles;

  static std::size_t input_bytes(const Header& h) {
    return blocks_of<F>(h, 0) * (sizeof(GroupInputs) + sizeof(GroupScale));
  }

  // A scale for each group: next to an outlier only the inputs of its own group lose bits.
  static void prepare(const Header& h, const float* x, std::byte* inputs) {
    auto* group = reinterpret_cast<GroupInputs*>(inputs);
    auto* scale = reinterpret_cast<GroupScale*>(group + blocks_of<F>(h, 0));
    for (std::uint32_t first = 0; first < h.columns; first += kGroupColumns) {
      alignas(64) float values[kGroupColumns] = {};
      std::memcpy(values, x + first, std::min(kGroupColumns, h.columns - first) * sizeof(float));
      *scale++ = prepare_group(values, *group++);
    }
  }

  template <int kCount>
  static void multiply(const Packed& packed, std::uint32_t slice, std::uint32_t /*panel*/, std::byte* const* inputs,
                       float (*sums)[kMaxRows]) {
    const Header& h = packed.header;
    const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of<F>(h, 0);
    RecordReader<F> records(packed, unit_of(packed, slice, 0));
    const GroupScale* scales[kCount];
    for (int t = 0; t < kCount; ++t) {
      scales[t] = reinterpret_cast<const GroupScale*>(groups_of_token(inputs[t]) + blocks);
    }
    for (std::uint32_t pair = 0; pair < band_pairs(rows); ++pair) {
      typename Isa::Lanes total[kBands * kCount];
      unrolled<kBands * kCount>([&](auto i) { total[i] = Isa::broadcast(0); });
      for (std::uint32_t block = 0; block < blocks; ++block) {
        const std::uint8_t* const record = records.next();
        const std::int8_t* x[kCount];
        for (int t = 0; t < kCount; ++t) x[t] = groups_of_token(inputs[t])[block].upper;
        typename Isa::Group sum[kBands * kCount];
        records.used(add_block<kCount>(record, x, sum));
        unrolled<kBands>([&](auto band) {
          const auto weight_scales = Isa::load_halves(record + band * kLanes * sizeof(std::uint16_t));
          unrolled<kCount>([&](auto t) {
            const GroupScale& of_inputs = scales[t][block];
            constexpr auto i = band * kCount + t;
            const auto whole = Isa::template total<band>(sum[i], of_inputs.sum);
            constexpr float kPower = band == 0 ? 1.0f : 1.0f / Isa::kUpperNibble;
            const auto scaled = Isa::multiply(whole, Isa::broadcast(of_inputs.scale * kPower));
            total[i] = Isa::fused(scaled, weight_scales, total[i]);
          });
        });
      }
      unrolled<kBands * kCount>([&](auto i) {
        Isa::store(sums[i % kCount] + (pair * kBands + i / kCount) * kLanes, total[i]);
      });
    }
  }

 private:
  static const GroupInputs* groups_of_token(const std::byte* inputs) {
    return reinterpret_cast<const GroupInputs*>(inputs);
  }

  static GroupScale prepare_group(const float* values, GroupInputs& group) {
    // The largest magnitude, by its bits: integers that a compiler can compare 16 at a time, and NaN is the largest.
    std::uint32_t largest = std::bit_cast<std::uint32_t>(kSmallestPeak);
    for (std::uint32_t i = 0; i < kGroupColumns; ++i) {
      largest = std::max(largest, std::bit_cast<std::uint32_t>(values[i]) & 0x7FFFFFFFu);
    }
    const float peak = std::bit_cast<float>(largest);
    if (!std::isfinite(peak)) {
      group = {};
      return {std::numeric_limits<float>::quiet_NaN(), 0};
    }
    const float inverse = kGroupInputLevels / peak;
    std::int32_t sum = 0;
    for (std::uint32_t i = 0; i < kGroupColumns; ++i) {
      const float level = std::nearbyint(values[i] * inverse);
      const auto x = static_cast<std::int32_t>(std::min(std::max(level, -kGroupInputLevels), kGroupInputLevels));
      const auto lower = static_cast<std::int8_t>(x);
      group.lower[i] = lower;
      group.upper[i] = static_cast<std::int8_t>((x - lower) >> 8);
      sum += x;
    }
    return {peak / kGroupInputLevels, sum};
  }

  // sum[band * kCount + token]: a group of each row of both bands. Returns how many bytes the weights have.
  template <int kCount>
  [[gnu::always_inline]] static std::ptrdiff_t add_block(const std::uint8_t* record, const std::int8_t* const* x,
                                                         typename Isa::Group* sum) {
    // As many bands at once as there are registers for: two share the loads of inputs.
    constexpr int kTogether = kCount <= Isa::kTokensOfTwoBands ? kBands : 1;
    std::ptrdiff_t most = 0;
    unrolled<kBands / kTogether>([&](auto turn) {
      most = std::max(most, add_bands<kCount, turn * kTogether, kTogether>(record, x, sum + turn * kTogether * kCount));
    });
    return most;
  }

  template <int kCount, int kFirst, int kTogether>
  [[gnu::always_inline]] static std::ptrdiff_t add_bands(const std::uint8_t* record, const std::int8_t* const* x,
                                                         typename Isa::Group* sums) {
    typename Isa::Group sum[kTogether * kCount];
    unrolled<kTogether * kCount>([&](auto i) { sum[i] = Isa::zero_group(); });
    const std::uint8_t* const weights = record + record_bytes_with<F>(0);
    const std::uint8_t* next[kTogether];
    unrolled<kTogether>([&](auto b) { next[b] = weights; });
    constexpr std::uint32_t kHalf = kTiles / 2;
    for (std::uint32_t half = 0; half < 2; ++half) {
      const auto* masks = reinterpret_cast<const std::uint64_t*>(record + kScaleBytes) + half * kHalf * kBands;
      unrolled<kHalf>([&](auto i) {
        const std::uint32_t tile = half * kHalf + i;
        typename Isa::Weights8 bytes[kTogether];
        unrolled<kTogether>([&](auto b) {
          if constexpr (F::kMasked) {
            const std::uint64_t& mask = masks[i * kBands + kFirst + b];
            bytes[b] = Isa::expand(mask, signed_bytes(next[b]));
            next[b] += std::popcount(mask);
          } else {
            bytes[b] = Isa::load8(signed_bytes(weights + tile * kTileBytes));
          }
        });
        if constexpr (kFirst == 0) Isa::prefetch(record + tile * kLine);
        if constexpr (kFirst == 0 && i == 0 && !F::kMasked) Isa::prefetch(record + (kTiles + half) * kLine);
        unrolled<kTogether>([&](auto b) {
          const auto integers = Isa::template nibbles<kFirst + b>(bytes[b]);
          unrolled<kCount>([&](auto t) { Isa::add_tile(sum[b * kCount + t], integers, x[t] + tile * kTileColumns); });
        });
      });
      unrolled<kTogether * kCount>([&](auto i) { Isa::half_done(sum[i]); });
    }
    unrolled<kTogether * kCount>([&](auto i) { sums[i] = sum[i]; });
    if constexpr (!F::kMasked) return kWeightBytes;
    return *std::max_element(next, next + kTogether) - weights;
  }

  static const std::int8_t* signed_bytes(const std::uint8_t* bytes) {
    return reinterpret_cast<const std::int8_t*>(bytes);
  }
};

}  // namespace
}  // namespace owl
