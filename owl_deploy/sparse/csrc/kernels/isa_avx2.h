// AVX2 with FMA: 16 lanes are two registers.
#pragma once

#include <immintrin.h>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/isa_scalar.h"
#include "kernels/kernel.h"

namespace owl {
namespace {

// Where the bits of each 8-bit mask are, as a byte shuffle: entry i says which of the compressed bytes goes to i.
constexpr auto kExpand8 = [] {
  std::array<std::uint64_t, 256> table{};
  for (std::uint64_t mask = 0; mask < 256; ++mask) {
    std::uint64_t next = 0;
    for (int i = 0; i < 8; ++i) {
      const std::uint64_t from = mask >> i & 1 ? next++ : 0x80;  // 0x80: a zero
      table[mask] |= from << (8 * i);
    }
  }
  return table;
}();

struct Avx2 {
  static constexpr const char* kName = "avx2";
  static constexpr std::int64_t kManyTokensOfWords = 16, kManyTokensOfBytes = 16;
  static constexpr int kVectors = 4;
  static constexpr int kPairVectors = 2;
  static constexpr std::int64_t kInputOffset = 0;
  static constexpr int kTokensOfNibbles = 2;
  static constexpr int kTokensOfTwoBands = 0;
  static constexpr int kUpperNibble = 1;

  struct Lanes {
    __m256 a, b;
  };
  struct Words {
    __m256i a, b;
  };
  struct Table {
    const float* inputs;
  };
  struct Weights8 {
    __m128i v[4];
  };
  struct Sum {
    __m256i high, low;  // of products with the upper 16 and the lower 8 bits of the inputs
  };
  struct Weights4 {
    __m256i a, b;
  };
  struct Half {  // of a group: four products of a row are in two lanes of 16 bits, which eight tiles do not overflow
    __m256i a, b;
  };
  struct Group {
    Half upper, lower;  // of products with the two bytes of the inputs
    __m256i a, b;       // those of the tiles before, together
  };

  [[gnu::always_inline]] static void prefetch(const void* from) {
    _mm_prefetch(static_cast<const char*>(from) + kPrefetchBytes, _MM_HINT_T0);
  }
  static Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static void store(float* to, Lanes lanes) {
    _mm256_storeu_ps(to, lanes.a);
    _mm256_storeu_ps(to + 8, lanes.b);
  }
  static Lanes broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
  }
  static Lanes multiply(Lanes a, Lanes b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
  static Lanes fused(Lanes a, Lanes b, Lanes c) { return multiply_add(a, b, c); }
  static Lanes gather(const float* from, const std::uint8_t* places) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(places));
    return {_mm256_i32gather_ps(from, _mm256_cvtepu8_epi32(bytes), sizeof(float)),
            _mm256_i32gather_ps(from, _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), sizeof(float))};
  }

  static Table table(const float* inputs) { return {inputs}; }
  static Words load_words(const std::uint32_t* from) {
    const auto* at = reinterpret_cast<const __m256i*>(from);
    return {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
  }
  static Words load_words(const std::uint16_t* from) {
    const auto* at = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtepi16_epi32(_mm_load_si128(at)), _mm256_cvtepi16_epi32(_mm_load_si128(at + 1))};
  }
  template <class Word>
  static Lanes weight(Words words) {
    if constexpr (sizeof(Word) == 4) return {_mm256_castsi256_ps(words.a), _mm256_castsi256_ps(words.b)};
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(words.a, 5)), _mm256_cvtepi32_ps(_mm256_srai_epi32(words.b, 5))};
  }
  static Lanes lookup(const Table& table, Words words) {
    const __m256i index_bits = _mm256_set1_epi32(kBlockColumns - 1);
    return {_mm256_i32gather_ps(table.inputs, _mm256_and_si256(words.a, index_bits), sizeof(float)),
            _mm256_i32gather_ps(table.inputs, _mm256_and_si256(words.b, index_bits), sizeof(float))};
  }

  static Weights8 load8(const std::int8_t* from) {
    const auto* at = reinterpret_cast<const __m128i*>(from);
    return {{_mm_loadu_si128(at), _mm_loadu_si128(at + 1), _mm_loadu_si128(at + 2), _mm_loadu_si128(at + 3)}};
  }
  static Weights8 expand(std::uint64_t mask, const std::int8_t* from) {
    Weights8 weights;
    for (__m128i& part : weights.v) {
      const auto low = static_cast<std::uint8_t>(mask), high = static_cast<std::uint8_t>(mask >> 8);
      const __m128i first = expand8(low, from);
      from += std::popcount(low);
      const __m128i second = expand8(high, from);
      from += std::popcount(high);
      part = _mm_unpacklo_epi64(first, second);
      mask >>= 16;
    }
    return weights;
  }
  static void store_inputs(std::byte* inputs, std::uint32_t block, const std::int32_t* values) {
    Scalar::store_inputs(inputs, block, values);
  }
  static Sum zero_sum() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  using Inputs = const std::byte*;  // those of a block
  static Inputs load_inputs(const std::byte* inputs, std::uint32_t block) {
    return inputs + std::size_t{block} * kInputBytes * kMaskColumns;
  }
  static void add_product(Sum& sum, const Weights8& weights, Inputs at) {
    const auto* high = reinterpret_cast<const __m256i*>(at);
    const auto* low = reinterpret_cast<const __m128i*>(at + 2 * kMaskColumns);
    for (int i = 0; i < 4; ++i) {
      const __m256i w = _mm256_cvtepi8_epi16(weights.v[i]);
      sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(w, _mm256_loadu_si256(high + i)));
      const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(low + i));
      sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(w, x));
    }
  }
  static std::int64_t total(const Sum& sum) { return 256 * add_lanes(sum.high) + add_lanes(sum.low); }
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
    const auto* at = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
  }
  // VPMADDUBSW wants one side without a sign: a weight plus 8 is the nibble with its highest bit turned over.
  template <int kBand>
  static Weights4 nibbles(const Weights8& bytes) {
    const auto weights = [&](int i) {
      __m256i v = _mm256_set_m128i(bytes.v[i + 1], bytes.v[i]);
      if constexpr (kBand == 1) v = _mm256_srli_epi16(v, 4);
      return _mm256_xor_si256(_mm256_and_si256(v, _mm256_set1_epi8(0x0F)), _mm256_set1_epi8(8));
    };
    return {weights(0), weights(2)};
  }
  static Group zero_group() {
    const __m256i zero = _mm256_setzero_si256();
    return {{zero, zero}, {zero, zero}, zero, zero};
  }
  static void add_tile(Group& sum, const Weights4& weights, const std::int8_t* x) {
    const auto add = [&](Half& half, const std::int8_t* inputs) {
      std::int32_t four;
      std::memcpy(&four, inputs, sizeof(four));
      const __m256i of_row = _mm256_set1_epi32(four);
      half.a = _mm256_add_epi16(half.a, _mm256_maddubs_epi16(weights.a, of_row));
      half.b = _mm256_add_epi16(half.b, _mm256_maddubs_epi16(weights.b, of_row));
    };
    add(sum.upper, x);
    add(sum.lower, x + kGroupColumns);
  }
  static void half_done(Group& sum) {
    const __m256i ones = _mm256_set1_epi16(1);
    const auto both = [&](__m256i upper, __m256i lower) {
      return _mm256_add_epi32(_mm256_slli_epi32(_mm256_madd_epi16(upper, ones), 8), _mm256_madd_epi16(lower, ones));
    };
    sum.a = _mm256_add_epi32(sum.a, both(sum.upper.a, sum.lower.a));
    sum.b = _mm256_add_epi32(sum.b, both(sum.upper.b, sum.lower.b));
    const __m256i zero = _mm256_setzero_si256();
    sum.upper = sum.lower = {zero, zero};
  }
  template <int kBand>
  static Lanes total(const Group& sum, std::int32_t inputs) {
    const __m256i offset = _mm256_set1_epi32(8 * inputs);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(sum.a, offset)), _mm256_cvtepi32_ps(_mm256_sub_epi32(sum.b, offset))};
  }

 private:
  static constexpr std::size_t kPrefetchBytes = 4096;  // a page: the CPU itself does not look beyond one

  static std::int64_t add_lanes(__m256i sum) {
    std::int32_t lanes[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
    std::int64_t all = 0;
    for (const std::int32_t lane : lanes) all += lane;
    return all;
  }
  static __m128i expand8(std::uint8_t mask, const std::int8_t* from) {
    return _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)),
                            _mm_cvtsi64_si128(static_cast<long long>(kExpand8[mask])));
  }
};

}  // namespace
}  // namespace owl
