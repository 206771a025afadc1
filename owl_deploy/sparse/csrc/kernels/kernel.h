// What a format has to bring for each way, as a template over the instruction set (isa_*.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/kernels.h"

namespace owl {
namespace {

constexpr std::uint32_t kInputBytes = 3;  // of a 24-bit input, which 8-bit weights are multiplied with

// Few tokens (few.h). A specialisation has
//
//   static constexpr int kTokens;
//       that go through the weights together, at most: a power of two
//   static std::size_t input_bytes(const Header& h);
//       of one token, as prepare() lays them out
//   static void prepare(const Header& h, const float* x, std::byte* inputs);
//   template <int kCount>
//   static void multiply(const Packed& packed, std::uint32_t slice, std::uint32_t panel, std::byte* const* inputs,
//                        float (*sums)[kMaxRows]);
//       sums[token][row of the slice] of one unit and so many tokens, before the scales of rows
template <class Isa, class F>
struct FewKernel;

// The slices that an item of many tokens takes.
struct Slices {
  std::uint32_t first, end;
};

// Many tokens (many.h). A specialisation has
//
//   static std::uint32_t slices_together(const Header& h);
//       that one item takes: of no more than 256 rows, which is about what shares inputs that stay in L1
//   static void multiply(const Packed& packed, Slices slices, const float* x, std::int64_t stride, float* sums);
//       adds to sums[row of the slices][token of a tile]; x is [column][token], both of `stride` tokens in a row
template <class Isa, class F>
struct ManyKernel;

// f(0) … f(kCount - 1), written out: arrays that only such loops index can live in registers.
template <int kCount, class F>
[[gnu::always_inline]] inline void unrolled(F&& f) {
  if constexpr (kCount > 0) {
    unrolled<kCount - 1>(f);
    f(std::integral_constant<int, kCount - 1>{});
  }
}

}  // namespace
}  // namespace owl
