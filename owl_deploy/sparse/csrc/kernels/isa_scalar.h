// Portable C++, and the reference that the other instruction sets are tested against. What an instruction set is:
//
//   Lanes      16 floats, one for each row of a group or for each of 16 tokens
//   Table      32 inputs of one block of columns; lookup() picks 16 of them by the low 5 bits of 16 words
//   Weights8   64 signed bytes, one for each column under a mask; Sum adds up their products with 24-bit inputs
//   Weights4   64 integers of 4 bits as bytes, four columns of each of 16 rows; Group adds up each row's products with
//              16-bit inputs, whose upper bytes add_tile() is given, the lower ones lying 64 bytes further on
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "format/half.h"
#include "kernels/kernel.h"

namespace owl {
namespace {

// Inputs of 24 bits as their upper 16, signed, and their lower 8, unsigned: how all but AVX-512 read them.
inline void split_inputs(std::byte* to, const std::int32_t* values) {
  auto* high = reinterpret_cast<std::int16_t*>(to);
  auto* low = reinterpret_cast<std::uint8_t*>(high + kMaskColumns);
  for (std::uint32_t i = 0; i < kMaskColumns; ++i) {
    high[i] = static_cast<std::int16_t>(values[i] >> 8);
    low[i] = static_cast<std::uint8_t>(values[i]);
  }
}

struct Scalar {
  static constexpr const char* kName = "scalar";
  static constexpr std::int64_t kManyTokensOfWords = 16, kManyTokensOfBytes = 16;
  static constexpr int kVectors = 4;               // Lanes that add_row keeps in registers …
  static constexpr int kPairVectors = 2;           // … and add_two_rows, for each row
  static constexpr std::int64_t kInputOffset = 0;  // what store_inputs adds to each input
  static constexpr int kTokensOfNibbles = 4;   // that go through 4-bit weights together, a power of two …
  static constexpr int kTokensOfTwoBands = 1;  // … and at most so many through two bands at a time
  static constexpr int kUpperNibble = 1;       // by what weights of the upper nibble are multiplied

  struct Lanes {
    float v[kLanes];
  };
  struct Words {
    std::uint32_t v[kLanes];
  };
  struct Table {
    const float* inputs;
  };
  struct Weights8 {
    std::int8_t v[kMaskColumns];
  };
  using Sum = std::int64_t;
  using Weights4 = Weights8;
  struct Group {
    std::int32_t v[kLanes];
  };

  [[gnu::always_inline]] static void prefetch(const void*) {}
  static Lanes load(const float* from) {
    Lanes lanes;
    std::memcpy(lanes.v, from, sizeof(lanes.v));
    return lanes;
  }
  static void store(float* to, const Lanes& lanes) { std::memcpy(to, lanes.v, sizeof(lanes.v)); }
  static Lanes broadcast(float value) {
    Lanes lanes;
    for (float& lane : lanes.v) lane = value;
    return lanes;
  }
  static Lanes multiply_add(const Lanes& a, const Lanes& b, Lanes c) {
    for (std::uint32_t i = 0; i < kLanes; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static Lanes multiply(const Lanes& a, Lanes b) {
    for (std::uint32_t i = 0; i < kLanes; ++i) b.v[i] *= a.v[i];
    return b;
  }
  // With one rounding.
  static Lanes fused(const Lanes& a, const Lanes& b, Lanes c) {
    for (std::uint32_t i = 0; i < kLanes; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
    return c;
  }
  static Lanes gather(const float* from, const std::uint8_t* places) {
    Lanes lanes;
    for (std::uint32_t i = 0; i < kLanes; ++i) lanes.v[i] = from[places[i]];
    return lanes;
  }

  static Table table(const float* inputs) { return {inputs}; }
  template <class Word>
  static Words load_words(const Word* from) {
    Words words;
    for (std::uint32_t i = 0; i < kLanes; ++i) {
      // 16-bit words keep their sign in 32 bits
      words.v[i] = sizeof(Word) == 4 ? from[i] : static_cast<std::uint32_t>(static_cast<std::int16_t>(from[i]));
    }
    return words;
  }
  template <class Word>
  static Lanes weight(const Words& words) {
    Lanes lanes;
    for (std::uint32_t i = 0; i < kLanes; ++i) {
      lanes.v[i] = sizeof(Word) == 4 ? std::bit_cast<float>(words.v[i])
                                     : static_cast<float>(static_cast<std::int32_t>(words.v[i]) >> 5);
    }
    return lanes;
  }
  static Lanes lookup(const Table& table, const Words& words) {
    Lanes lanes;
    for (std::uint32_t i = 0; i < kLanes; ++i) lanes.v[i] = table.inputs[words.v[i] % kBlockColumns];
    return lanes;
  }

  static Weights8 load8(const std::int8_t* from) {
    Weights8 weights;
    std::memcpy(weights.v, from, sizeof(weights.v));
    return weights;
  }
  static Weights8 expand(std::uint64_t mask, const std::int8_t* from) {
    Weights8 weights{};
    for (; mask != 0; mask &= mask - 1) weights.v[std::countr_zero(mask)] = *from++;
    return weights;
  }
  static void store_inputs(std::byte* inputs, std::uint32_t block, const std::int32_t* values) {
    split_inputs(inputs + std::size_t{block} * kInputBytes * kMaskColumns, values);
  }
  static Sum zero_sum() { return 0; }
  using Inputs = const std::byte*;  // those of a block
  static Inputs load_inputs(const std::byte* inputs, std::uint32_t block) {
    return inputs + std::size_t{block} * kInputBytes * kMaskColumns;
  }
  static void add_product(Sum& sum, const Weights8& weights, Inputs at) {
    const auto* high = reinterpret_cast<const std::int16_t*>(at);
    const auto* low = reinterpret_cast<const std::uint8_t*>(high + kMaskColumns);
    for (std::uint32_t i = 0; i < kMaskColumns; ++i) sum += std::int64_t{weights.v[i]} * (high[i] * 256 + low[i]);
  }
  static std::int64_t total(Sum sum) { return sum; }
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
    for (std::uint32_t i = 0; i < kLanes; ++i) {
      std::uint16_t half;
      std::memcpy(&half, from + i * sizeof(half), sizeof(half));
      lanes.v[i] = half_to_float(half);
    }
    return lanes;
  }
  template <int kBand>
  static Weights4 nibbles(Weights8 bytes) {
    for (std::int8_t& v : bytes.v) v = static_cast<std::int8_t>(static_cast<std::int8_t>(v << 4 * (1 - kBand)) >> 4);
    return bytes;
  }
  static Group zero_group() { return {}; }
  static void add_tile(Group& sum, const Weights4& weights, const std::int8_t* x) {
    for (std::uint32_t i = 0; i < kTileBytes; ++i) {
      const std::uint32_t column = i % kTileColumns;
      sum.v[i / kTileColumns] += weights.v[i] * (x[column] * 256 + x[column + kGroupColumns]);
    }
  }
  // Called after half the tiles of a group, and after all.
  static void half_done(Group&) {}
  // The sums of the upper nibbles' band (1) are kUpperNibble times what they are. `inputs` is the sum of the inputs.
  template <int kBand>
  static Lanes total(const Group& sum, std::int32_t /*inputs*/) {
    Lanes lanes;
    for (std::uint32_t i = 0; i < kLanes; ++i) lanes.v[i] = static_cast<float>(sum.v[i]);
    return lanes;
  }
};

}  // namespace
}  // namespace owl
