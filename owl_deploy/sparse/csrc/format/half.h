// Floats of 16 bits, IEEE 754's. Static, as in layout.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace owl {

inline constexpr float kLargestHalf = 65504;

static inline bool is_finite_half(std::uint16_t half) { return (half & 0x7C00) != 0x7C00; }

static inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half} >> 15 << 31, exponent = half >> 10 & 31, mantissa = half & 0x3FF;
  if (exponent == 0) {  // zero, or denormal
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wider = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | wider << 23 | mantissa << 13);
}

// To the nearest, ties to even; what is larger than any becomes the largest. Not of NaN.
static inline std::uint16_t float_to_half(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= kLargestHalf) return sign | 0x7BFF;
  if (magnitude < 0x1p-14f) {  // a denormal is a multiple of 2^-24, and a sum with 0.5 has no finer ones
    return sign | static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(magnitude + 0.5f) - 0x3F000000u);
  }
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(magnitude) - ((127u - 15) << 23);
  return sign | static_cast<std::uint16_t>((bits + 0xFFF + (bits >> 13 & 1)) >> 13);
}

}  // namespace owl
