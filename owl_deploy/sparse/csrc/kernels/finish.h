// From a slice's sums to outputs: scales, and of a paired matrix silu(gate) * up.
#pragma once

#include <bit>

#include "kernels/kernels.h"

namespace owl {
namespace {

// e^x in plain arithmetic, to 2 units in the last place, so that a compiler can vectorise a loop of it.
inline float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kRound = 12582912.0f;
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float rounded = x * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const std::uint32_t power = (std::bit_cast<std::uint32_t>(rounded) << 23) + 0x3F800000u;
  return p * std::bit_cast<float>(power);
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

template <class F>
void finish(const Packed& packed, std::uint32_t slice, const float* sums, float* y) {
  const Header& h = packed.header;
  const std::uint32_t rows = rows_of(h, slice), half = rows / 2;
  const float* scales = F::kLevels == 0 ? nullptr : packed.scales + std::size_t{slice} * h.slice_rows;
  const auto row = [&](std::uint32_t i) {
    if constexpr (F::kLevels == 0) return sums[i];
    return sums[i] * scales[i];
  };
  if (h.paired) {
    float* out = y + std::size_t{slice} * (h.slice_rows / 2);
    for (std::uint32_t i = 0; i < half; ++i) out[i] = silu(row(i)) * row(half + i);
  } else {
    float* out = y + std::size_t{slice} * h.slice_rows;
    for (std::uint32_t i = 0; i < rows; ++i) out[i] = row(i);
  }
}

}  // namespace
}  // namespace owl
