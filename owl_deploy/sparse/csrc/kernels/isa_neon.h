// NEON of 64-bit ARM: 16 lanes are four registers.
#pragma once

#include <arm_neon.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/isa_scalar.h"
#include "kernels/kernel.h"

namespace owl {
namespace {

struct Neon {
  static constexpr const char* kName = "neon";
  static constexpr std::int64_t kManyTokensOfWords = 16, kManyTokensOfBytes = 16;
  static constexpr int kVectors = 4;
  static constexpr int kPairVectors = 2;
  static constexpr std::int64_t kInputOffset = 0;
  static constexpr int kTokensOfNibbles = 1;
  static constexpr int kTokensOfTwoBands = 0;
  static constexpr int kUpperNibble = 1;

  struct Lanes {
    float32x4_t v[4];
  };
  struct Words {
    uint32x4_t v[4];
  };
  struct Table {
    uint8x16x4_t low, high;  // 16 inputs each, as bytes
  };
  struct Weights8 {
    int8x16_t v[4];
  };
  struct Sum {
    int32x4_t high[4], low[4];  // of products with the upper 16 and the lower 8 bits of the inputs
  };
  using Weights4 = Weights8;
  struct Group {
    int16x8_t upper[8], lower[8];  // of products with the two bytes of the inputs: four lanes a row
  };

  [[gnu::always_inline]] static void prefetch(const void* from) {
    __builtin_prefetch(static_cast<const char*>(from) + kPrefetchBytes);
  }
  static Lanes load(const float* from) {
    return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
  }
  static void store(float* to, const Lanes& lanes) {
    for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, lanes.v[i]);
  }
  static Lanes broadcast(float value) {
    const float32x4_t v = vdupq_n_f32(value);
    return {{v, v, v, v}};
  }
  static Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
    Lanes sum;
    for (int i = 0; i < 4; ++i) sum.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return sum;
  }
  static Lanes multiply(const Lanes& a, Lanes b) {
    for (int i = 0; i < 4; ++i) b.v[i] = vmulq_f32(a.v[i], b.v[i]);
    return b;
  }
  static Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) { return multiply_add(a, b, c); }
  static Lanes gather(const float* from, const std::uint8_t* places) {
    float lanes[kLanes];
    for (std::uint32_t i = 0; i < kLanes; ++i) lanes[i] = from[places[i]];
    return load(lanes);
  }

  static Table table(const float* inputs) { return {bytes(inputs), bytes(inputs + kLanes)}; }
  static Words load_words(const std::uint32_t* from) {
    return {{vld1q_u32(from), vld1q_u32(from + 4), vld1q_u32(from + 8), vld1q_u32(from + 12)}};
  }
  static Words load_words(const std::uint16_t* from) {
    Words words;
    for (int i = 0; i < 4; ++i) {
      words.v[i] = vreinterpretq_u32_s32(vmovl_s16(vreinterpret_s16_u16(vld1_u16(from + 4 * i))));
    }
    return words;
  }
  template <class Word>
  static Lanes weight(const Words& words) {
    Lanes lanes;
    for (int i = 0; i < 4; ++i) {
      lanes.v[i] = sizeof(Word) == 4 ? vreinterpretq_f32_u32(words.v[i])
                                     : vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(words.v[i]), 5));
    }
    return lanes;
  }
  // A byte lookup among 128 bytes: index i means bytes 4i to 4i + 3, and what is out of a table's range is left.
  static Lanes lookup(const Table& table, const Words& words) {
    Lanes lanes;
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t index = vandq_u32(words.v[i], vdupq_n_u32(kBlockColumns - 1));
      const uint32x4_t first = vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404);
      const uint8x16_t at = vreinterpretq_u8_u32(first);
      const uint8x16_t found = vqtbx4q_u8(vqtbl4q_u8(table.low, at), table.high, vsubq_u8(at, vdupq_n_u8(64)));
      lanes.v[i] = vreinterpretq_f32_u8(found);
    }
    return lanes;
  }

  static Weights8 load8(const std::int8_t* from) {
    return {{vld1q_s8(from), vld1q_s8(from + 16), vld1q_s8(from + 32), vld1q_s8(from + 48)}};
  }
  static Weights8 expand(std::uint64_t mask, const std::int8_t* from) {
    std::int8_t weights[kMaskColumns] = {};
    for (; mask != 0; mask &= mask - 1) weights[std::countr_zero(mask)] = *from++;
    return load8(weights);
  }
  static void store_inputs(std::byte* inputs, std::uint32_t block, const std::int32_t* values) {
    Scalar::store_inputs(inputs, block, values);
  }
  static Sum zero_sum() {
    const int32x4_t zero = vdupq_n_s32(0);
    return {{zero, zero, zero, zero}, {zero, zero, zero, zero}};
  }
  using Inputs = const std::byte*;  // those of a block
  static Inputs load_inputs(const std::byte* inputs, std::uint32_t block) {
    return inputs + std::size_t{block} * kInputBytes * kMaskColumns;
  }
  static void add_product(Sum& sum, const Weights8& weights, Inputs at) {
    const auto* high = reinterpret_cast<const std::int16_t*>(at);
    const auto* low = reinterpret_cast<const std::uint8_t*>(at + 2 * kMaskColumns);
    for (int i = 0; i < 4; ++i, high += 16, low += 16) {
      const int16x8_t first = vmovl_s8(vget_low_s8(weights.v[i])), second = vmovl_high_s8(weights.v[i]);
      add_16(sum.high, first, second, vld1q_s16(high), vld1q_s16(high + 8));
      const uint8x16_t bytes = vld1q_u8(low);
      add_16(sum.low, first, second, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes))),
             vreinterpretq_s16_u16(vmovl_high_u8(bytes)));
    }
  }
  static std::int64_t total(const Sum& sum) {
    std::int64_t all = 0;
    for (int i = 0; i < 4; ++i) all += 256 * vaddlvq_s32(sum.high[i]) + vaddlvq_s32(sum.low[i]);
    return all;
  }
  // Sums of 16 rows.
  struct RowSums {
    std::int64_t of[kLanes];
  };
  static void keep(RowSums& rows, std::uint32_t row, const Sum& sum, bool is_first) {
    rows.of[row] = total(sum) + (is_first ? 0 : rows.of[row]);
  }
  static void add_kept(const RowSums& rows, std::int64_t* totals) {
    for (std::uint32_t i = 0; i < kLanes; ++i) totals[i] += rows.of[i];
  }

  static Lanes load_halves(const std::uint8_t* from) {
    Lanes lanes;
    for (int i = 0; i < 4; ++i) {
      lanes.v[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from + 8 * i)));
    }
    return lanes;
  }
  template <int kBand>
  static Weights4 nibbles(Weights8 bytes) {
    for (int8x16_t& v : bytes.v) v = vshrq_n_s8(kBand == 0 ? vshlq_n_s8(v, 4) : v, 4);
    return bytes;
  }
  static Group zero_group() {
    Group sum;
    for (int i = 0; i < 8; ++i) sum.upper[i] = sum.lower[i] = vdupq_n_s16(0);
    return sum;
  }
  static void add_tile(Group& sum, const Weights4& weights, const std::int8_t* x) {
    std::int32_t upper, lower;
    std::memcpy(&upper, x, sizeof(upper));
    std::memcpy(&lower, x + kGroupColumns, sizeof(lower));
    const int8x16_t u = vreinterpretq_s8_s32(vdupq_n_s32(upper)), l = vreinterpretq_s8_s32(vdupq_n_s32(lower));
    for (int i = 0; i < 4; ++i) {
      const int8x16_t w = weights.v[i];
      sum.upper[2 * i] = vmlal_s8(sum.upper[2 * i], vget_low_s8(w), vget_low_s8(u));
      sum.upper[2 * i + 1] = vmlal_high_s8(sum.upper[2 * i + 1], w, u);
      sum.lower[2 * i] = vmlal_s8(sum.lower[2 * i], vget_low_s8(w), vget_low_s8(l));
      sum.lower[2 * i + 1] = vmlal_high_s8(sum.lower[2 * i + 1], w, l);
    }
  }
  static void half_done(Group&) {}
  template <int kBand>
  static Lanes total(const Group& sum, std::int32_t /*inputs*/) {
    const auto rows = [](const int16x8_t* v) { return vpaddq_s32(vpaddlq_s16(v[0]), vpaddlq_s16(v[1])); };
    Lanes lanes;
    for (int i = 0; i < 4; ++i) {
      lanes.v[i] = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(rows(sum.upper + 2 * i), 8), rows(sum.lower + 2 * i)));
    }
    return lanes;
  }

 private:
  static constexpr std::size_t kPrefetchBytes = 4096;  // a page: the CPU itself does not look beyond one

  static void add_16(int32x4_t* sum, int16x8_t w, int16x8_t v, int16x8_t a, int16x8_t b) {
    sum[0] = vmlal_s16(sum[0], vget_low_s16(w), vget_low_s16(a));
    sum[1] = vmlal_high_s16(sum[1], w, a);
    sum[2] = vmlal_s16(sum[2], vget_low_s16(v), vget_low_s16(b));
    sum[3] = vmlal_high_s16(sum[3], v, b);
  }
  static uint8x16x4_t bytes(const float* from) {
    uint8x16x4_t table;
    for (int i = 0; i < 4; ++i) table.val[i] = vreinterpretq_u8_f32(vld1q_f32(from + 4 * i));
    return table;
  }
};

}  // namespace
}  // namespace owl
