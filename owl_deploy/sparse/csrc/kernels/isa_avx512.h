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

  static void prefetch(const void* from) {
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
  static void add_product(Sum& sum, Weights8 weights, const std::byte* inputs, std::uint32_t block) {
    const std::byte* x = inputs + std::size_t{block} * kInputBytes * kMaskColumns;
    sum.high = _mm512_dpbusd_epi32(sum.high, _mm512_loadu_si512(x), weights);
    sum.middle = _mm512_dpbusd_epi32(sum.middle, _mm512_loadu_si512(x + kMaskColumns), weights);
    sum.low = _mm512_dpbusd_epi32(sum.low, _mm512_loadu_si512(x + 2 * kMaskColumns), weights);
  }
  // Lane by lane the upper two sums fit in 32 bits together: 2048 columns give a lane of `high` 2^22 at most.
  static std::int64_t total(const Sum& sum) {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.middle);
    const auto wide = [](__m512i v) {
      return _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                              _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)));
    };
    return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_slli_epi64(wide(upper), 8), wide(sum.low)));
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
};

}  // namespace
}  // namespace owl
