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

constexpr float kGroupInputLevels = 32639;  // the largest input: 127 * 256 + 127, so that both bytes have a sign
constexpr float kSmallestPeak = 0x1p-80f;   // groups of inputs all below it share its scale

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
    const std::uint8_t* record = unit_of(packed, slice, 0).begin;
    const std::uint8_t* values = record + records_bytes<F>(rows, blocks);
    const GroupScale* scales[kCount];
    for (int t = 0; t < kCount; ++t) {
      scales[t] = reinterpret_cast<const GroupScale*>(groups_of_token(inputs[t]) + blocks);
    }
    for (std::uint32_t pair = 0; pair < band_pairs(rows); ++pair) {
      typename Isa::Lanes total[kBands * kCount];
      unrolled<kBands * kCount>([&](auto i) { total[i] = Isa::broadcast(0); });
      Values of_bands{{values, values}};
      for (std::uint32_t block = 0; block < blocks; ++block, record += kRecordBytes<F>) {
        prefetch_record(record);
        const std::int8_t* x[kCount];
        for (int t = 0; t < kCount; ++t) x[t] = groups_of_token(inputs[t])[block].upper;
        typename Isa::Group sum[kBands * kCount];
        add_block<kCount>(record, of_bands, x, sum, last_values<std::uint8_t>(packed));
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
      values = std::max(of_bands.next[0], of_bands.next[1]);
      unrolled<kBands * kCount>([&](auto i) {
        Isa::store(sums[i % kCount] + (pair * kBands + i / kCount) * kLanes, total[i]);
      });
    }
  }

 private:
  // Of int4, where each band's next weights are.
  struct Values {
    const std::uint8_t* next[kBands];
  };
  static constexpr std::uint32_t kMostBytes = kTiles * kTileBytes;  // that a band's weights have in a block
  using LastValues = std::uint8_t[kMostBytes + kOverread];

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

  static void prefetch_record(const std::uint8_t* record) {
    constexpr std::uint32_t kLine = 64;
    unrolled<kRecordBytes<F> / kLine>([&](auto line) { Isa::prefetch(record + line * kLine); });
  }

  // sum[band * kCount + token]: a group of each row of both bands.
  template <int kCount>
  [[gnu::always_inline]] static void add_block(const std::uint8_t* record, Values& values,
                                               const std::int8_t* const* x, typename Isa::Group* sum,
                                               const std::uint8_t* last) {
    // Masks may have been rewritten since they were checked. Where they could lead out of the matrix, what is left of it
    // is copied to where they cannot.
    LastValues copies[F::kMasked ? kBands : 1];
    Values from = values;
    for (std::uint32_t band = 0; F::kMasked && band < kBands; ++band) {
      if (last - values.next[band] < kMostBytes) [[unlikely]] {
        copy_last(copies[band], values.next[band], last);
        from.next[band] = copies[band];
      }
    }
    const Values first = from;
    // As many bands at once as there are registers for: two share the loads of inputs.
    constexpr int kTogether = kCount <= Isa::kTokensOfTwoBands ? kBands : 1;
    unrolled<kBands / kTogether>([&](auto turn) {
      add_bands<kCount, turn * kTogether, kTogether>(record, from, x, sum + turn * kTogether * kCount);
    });
    for (std::uint32_t band = 0; F::kMasked && band < kBands; ++band) {
      values.next[band] = advanced(values.next[band], from.next[band] - first.next[band], last);
    }
  }

  template <int kCount, int kFirst, int kTogether>
  [[gnu::always_inline]] static void add_bands(const std::uint8_t* record, Values& from, const std::int8_t* const* x,
                                               typename Isa::Group* sums) {
    typename Isa::Group sum[kTogether * kCount];
    unrolled<kTogether * kCount>([&](auto i) { sum[i] = Isa::zero_group(); });
    const std::uint8_t* next[kTogether];
    unrolled<kTogether>([&](auto b) { next[b] = from.next[kFirst + b]; });
    constexpr std::uint32_t kHalf = kTiles / 2;
    for (std::uint32_t half = 0; half < 2; ++half) {
      const auto* masks = reinterpret_cast<const std::uint64_t*>(record + kScaleBytes) + half * kHalf * kBands;
      const std::uint8_t* tiles = record + kScaleBytes + half * kHalf * kTileBytes;
      unrolled<kHalf>([&](auto tile) {
        typename Isa::Weights8 bytes[kTogether];
        unrolled<kTogether>([&](auto b) {
          if constexpr (F::kMasked) {
            const std::uint64_t& mask = masks[tile * kBands + kFirst + b];
            bytes[b] = Isa::expand(mask, signed_bytes(next[b]));
            next[b] += std::popcount(mask);
          } else {
            bytes[b] = Isa::load8(signed_bytes(tiles + tile * kTileBytes));
          }
        });
        if constexpr (F::kMasked && kFirst == 0) Isa::prefetch(next[0]);
        unrolled<kTogether>([&](auto b) {
          const auto weights = Isa::template nibbles<kFirst + b>(bytes[b]);
          unrolled<kCount>([&](auto t) {
            Isa::add_tile(sum[b * kCount + t], weights, x[t] + (half * kHalf + tile) * kTileColumns);
          });
        });
      });
      unrolled<kTogether * kCount>([&](auto i) { Isa::half_done(sum[i]); });
    }
    unrolled<kTogether>([&](auto b) { from.next[kFirst + b] = next[b]; });
    unrolled<kTogether * kCount>([&](auto i) { sums[i] = sum[i]; });
  }

  static const std::int8_t* signed_bytes(const std::uint8_t* bytes) {
    return reinterpret_cast<const std::int8_t*>(bytes);
  }
  [[gnu::noinline]] static void copy_last(LastValues& copy, const std::uint8_t* values, const std::uint8_t* last) {
    const std::size_t left = static_cast<std::size_t>(last - values) + kOverread;
    std::memcpy(copy, values, left);
    std::memset(copy + left, 0, sizeof(copy) - left);
  }
};

}  // namespace
}  // namespace owl
