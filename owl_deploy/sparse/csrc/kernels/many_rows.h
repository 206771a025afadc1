// The inner loop of many tokens, which all formats share: a weight multiplies a row of inputs, one for each token.
#pragma once

#include "kernels/kernel.h"

namespace owl {
namespace {

// Row by row: sums[0 .. kVectors * 16) += weights times rows of `x`. `next(column, weight)` gives the weights.
template <class Isa, int kVectors, class Next>
inline void add_row(float* sums, const float* x, std::int64_t stride, Next next) {
  typename Isa::Lanes sum[kVectors];
  unrolled<kVectors>([&](auto v) { sum[v] = Isa::load(sums + v * kLanes); });
  std::uint32_t column;
  float weight;
  while (next(column, weight)) {
    const float* inputs = x + column * stride;
    const auto w = Isa::broadcast(weight);
    unrolled<kVectors>([&](auto v) { sum[v] = Isa::multiply_add(w, Isa::load(inputs + v * kLanes), sum[v]); });
  }
  unrolled<kVectors>([&](auto v) { Isa::store(sums + v * kLanes, sum[v]); });
}

template <class Isa, int kMost, class Make>
inline void add_some(std::int64_t count, float* sums, const float* x, std::int64_t stride, Make make) {
  if (count == kMost) {
    add_row<Isa, kMost>(sums, x, stride, make());
  } else if constexpr (kMost > 1) {
    add_some<Isa, kMost - 1>(count, sums, x, stride, make);
  }
}

// All vectors of a tile, as many at a time as the registers hold.
template <class Isa, class Make>
inline void add_rows(float* sums, const float* x, std::int64_t stride, Make make) {
  std::int64_t left = stride / kLanes;
  for (; left > Isa::kVectors; left -= Isa::kVectors, sums += Isa::kVectors * kLanes, x += Isa::kVectors * kLanes) {
    add_row<Isa, Isa::kVectors>(sums, x, stride, make());
  }
  add_some<Isa, Isa::kVectors>(left, sums, x, stride, make);
}

}  // namespace
}  // namespace owl
