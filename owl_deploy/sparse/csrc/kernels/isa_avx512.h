// AVX-512 as of Ice Lake and Zen 4: F, BW, VL, DQ, VBMI2 (byte expansion) and VNNI (8-bit products).
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/kernel.h"

namespace owl {
namespace {

struct Avx512 {
  static constexpr const char* kName = "avx512";
  static constexpr std::int64_t kManyTokensOfWords = 24, kManyTokensOfBytes = 48;
  static constexpr int kVectors = 8;
  static constexpr int kPairVectors = 8;
  static constexpr std::int64_t kInputOffset = 1 << 23;
  static constexpr int kTokensOfNibbles = 8;
  static constexpr int kTokensOfTwoBands = 4;
  static constexpr int kUpperNibble = 16;

  using Lanes = __m512;
  using Words = __m512i;
  struct Table {
    __m512 low, high;
  };
  using Weights8 = __m512i;
  struct Sum {
    __m512i high, middle, low;  // of products with the three bytes of the inputs
  };
  using Weights4 = __m512i;
  struct Group {
    __m512i upper, lower;  // of products with the two bytes of the inputs
  };

  // Always inlined: a call that does nothing else is dropped by GCC.
  [[gnu::always_inline]] static void prefetch(const void* from) {
    _mm_prefetch(static_cast<const char*>(from) + kPrefetchBytes, _MM_HINT_T0);
  }
  static Lanes load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Lanes lanes) { _mm512_storeu_ps(to, lanes); }
  static Lanes broadcast(float value) { return _mm512_set1_ps(value); }
  static Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
  static Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
  static Lanes fused(Lanes a, Lanes b, Lanes c) { return multiply_add(a, b, c); }
  static Lanes gather(const float* from, const std::uint8_t* places) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(places));
    // A gather merges with what its register held: unless that is a fresh zero, it waits for the group before. A mask
    // that the compiler cannot see through keeps it from dropping the zero.
    __mmask16 all = 0xFFFF;
    asm("" : "+Yk"(all));
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), all, _mm512_cvtepu8_epi32(bytes), from, sizeof(float));
  }

  static Table table(const float* inputs) { return {_mm512_loadu_ps(inputs), _mm512_loadu_ps(inputs + kLanes)}; }
  static Words load_words(const std::uint32_t* from) { return _mm512_load_si512(from); }
  static Words load_words(const std::uint16_t* from) {
    return _mm512_cvtepi16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(from)));
  }
  template <class Word>
  static Lanes weight(Words words) {
    if constexpr (sizeof(Word) == 4) return _mm512_castsi512_ps(words);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 5));
  }
  // The permutation reads 5 bits of each lane: words are indices as they are.
  static Lanes lookup(const Table& table, Words words) {
    return _mm512_permutex2var_ps(table.low, words, table.high);
  }

  static Weights8 load8(const std::int8_t* from) { return _mm512_loadu_si512(from); }
  static Weights8 expand(const std::uint64_t& mask, const std::int8_t* from) {
    __mmask64 where;  // from memory: by way of another register it is two thirds slower
    asm("kmovq %1, %0" : "=k"(where) : "m"(mask));
    __m512i packed = _mm512_loadu_si512(from);
    asm("" : "+v"(packed));  // keeps the load apart: VPEXPANDB from memory is several times slower than from a register
    return _mm512_maskz_expand_epi8(where, packed);
  }
  // An input plus 2^23 is an unsigned number of three bytes, and unsigned bytes are what VPDPBUSD wants.
  static void store_inputs(std::byte* inputs, std::uint32_t block, const std::int32_t* values) {
    std::byte* to = inputs + std::size_t{block} * kInputBytes * kMaskColumns;
    for (std::uint32_t i = 0; i < kMaskColumns; i += kLanes, to += kLanes) {
      const __m512i x = _mm512_add_epi32(_mm512_loadu_si512(values + i), _mm512_set1_epi32(1 << 23));
      const auto store = [to](std::uint32_t plane, __m512i v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + plane * kMaskColumns), _mm512_cvtepi32_epi8(v));
      };
      store(0, _mm512_srli_epi32(x, 16));
      store(1, _mm512_srli_epi32(x, 8));
      store(2, x);
    }
  }
  static Sum zero_sum() { return {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()}; }
  struct Inputs {
    __m512i high, middle, low;
  };
  static Inputs load_inputs(const std::byte* inputs, std::uint32_t block) {
    const std::byte* x = inputs + std::size_t{block} * kInputBytes * kMaskColumns;
    __m512i high = _mm512_loadu_si512(x), middle = _mm512_loadu_si512(x + kMaskColumns);
    __m512i low = _mm512_loadu_si512(x + 2 * kMaskColumns);
    asm("" : "+v"(high), "+v"(middle), "+v"(low));  // or the second row loads them again
    return {high, middle, low};
  }
  static void add_product(Sum& sum, Weights8 weights, const Inputs& x) {
    sum.high = _mm512_dpbusd_epi32(sum.high, x.high, weights);
    sum.middle = _mm512_dpbusd_epi32(sum.middle, x.middle, weights);
    sum.low = _mm512_dpbusd_epi32(sum.low, x.low, weights);
  }
  static std::int64_t total(const Sum& sum) {
    const auto lanes = [](__m512i v) { return std::int64_t{_mm512_reduce_add_epi32(v)}; };
    return 65536 * lanes(sum.high) + 256 * lanes(sum.middle) + lanes(sum.low);
  }

  // Sums of 16 rows: of each byte of the inputs 8 lanes, which are added up for all rows at once.
  struct RowSums {
    alignas(64) std::int32_t high[kLanes][8], middle[kLanes][8], low[kLanes][8];
  };
  static void keep(RowSums& rows, std::uint32_t row, const Sum& sum, bool is_first) {
    const auto halve = [&](std::int32_t (*of_rows)[8], __m512i v) {
      auto* to = reinterpret_cast<__m256i*>(of_rows[row]);
      const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
      _mm256_store_si256(to, is_first ? half : _mm256_add_epi32(half, _mm256_load_si256(to)));
    };
    halve(rows.high, sum.high);
    halve(rows.middle, sum.middle);
    halve(rows.low, sum.low);
  }
  static void add_kept(const RowSums& rows, std::int64_t* totals) {
    const __m512i high = add_lanes(rows.high), middle = add_lanes(rows.middle), low = add_lanes(rows.low);
    const auto add = [&](std::int64_t* to, __m256i h, __m256i m, __m256i l) {
      const __m512i upper = _mm512_add_epi64(_mm512_slli_epi64(_mm512_cvtepi32_epi64(h), 8), _mm512_cvtepi32_epi64(m));
      const __m512i sum = _mm512_add_epi64(_mm512_slli_epi64(upper, 8), _mm512_cvtepi32_epi64(l));
      _mm512_storeu_si512(to, _mm512_add_epi64(_mm512_loadu_si512(to), sum));
    };
    const auto half = [](__m512i v, auto i) { return _mm512_extracti64x4_epi64(v, decltype(i)::value); };
    constexpr std::integral_constant<int, 0> kFirst;
    constexpr std::integral_constant<int, 1> kSecond;
    add(totals, half(high, kFirst), half(middle, kFirst), half(low, kFirst));
    add(totals + 8, half(high, kSecond), half(middle, kSecond), half(low, kSecond));
  }

  static Lanes load_halves(const std::uint8_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  // VPDPBUSD wants one side without a sign: a weight plus 8 is the nibble with its highest bit turned over, 0 included.
  template <int kBand>
  static Weights4 nibbles(Weights8 bytes) {
    constexpr int kAndThenXor = 0x6A;
    return _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(static_cast<char>(kBand == 0 ? 0x0F : 0xF0)),
                                     _mm512_set1_epi8(static_cast<char>(kBand == 0 ? 0x08 : 0x80)), kAndThenXor);
  }
  static Group zero_group() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static void add_tile(Group& sum, Weights4 weights, const std::int8_t* x) {
    std::int32_t upper, lower;
    std::memcpy(&upper, x, sizeof(upper));
    std::memcpy(&lower, x + kGroupColumns, sizeof(lower));
    sum.upper = _mm512_dpbusd_epi32(sum.upper, weights, _mm512_set1_epi32(upper));
    sum.lower = _mm512_dpbusd_epi32(sum.lower, weights, _mm512_set1_epi32(lower));
  }
  static void half_done(Group&) {}
  template <int kBand>
  static Lanes total(const Group& sum, std::int32_t inputs) {
    const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(sum.upper, 8), sum.lower);
    constexpr int kOffset = kBand == 0 ? 8 : 8 * kUpperNibble;
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(both, _mm512_set1_epi32(kOffset * inputs)));
  }

 private:
  static constexpr std::size_t kPrefetchBytes = 4096;  // a page: the CPU itself does not look beyond one

  // The sums of 16 rows' 8 lanes. A register has two rows; each step adds up half of what is left of two registers.
  static __m512i add_lanes(const std::int32_t (*rows)[8]) {
    const auto two = [](__m512i a, __m512i b) {
      return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const auto four = [](__m512i a, __m512i b) {
      return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    };
    const auto load = [rows](int row) { return _mm512_load_si512(rows[row]); };
    const __m512i first = four(two(load(0), load(2)), two(load(4), load(6)));
    const __m512i second = four(two(load(8), load(10)), two(load(12), load(14)));
    const __m512i all = _mm512_add_epi32(_mm512_shuffle_i32x4(first, second, 0x88),
                                         _mm512_shuffle_i32x4(first, second, 0xDD));
    // They are in the order 0 2 4 6, 1 3 5 7, 8 10 12 14, 9 11 13 15.
    const __m512i in_order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return _mm512_permutexvar_epi32(in_order, all);
  }
};

}  // namespace
}  // namespace owl
