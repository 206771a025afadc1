#include "format/grid4.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include "format/formats.h"
#include "format/half.h"

namespace owl {
namespace {

constexpr float kLowest = -8, kHighest = 7;
constexpr std::array kCuts = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};  // of the largest weight

// Of those with the largest magnitude a negative one, if there is one.
float largest_of(const float* weights) {
  float lowest = 0, highest = 0;
  for (std::uint32_t c = 0; c < kGroupColumns; ++c) {
    lowest = std::min(lowest, weights[c]);
    highest = std::max(highest, weights[c]);
  }
  return highest > -lowest ? highest : lowest;
}

// The nearest integer, ties to even. Loops of it are vectorised: what a sum with 1.5 * 2^23 loses is the fraction.
float nearest(float weight, float scale) {
  constexpr float kWholeNumbers = 0x1.8p23f;
  const float rounded = (weight / scale + kWholeNumbers) - kWholeNumbers;
  return std::min(std::max(rounded, kLowest), kHighest);
}

bool are_on_grid(const float* weights, float scale) {
  int off = 0;
  for (std::uint32_t c = 0; c < kGroupColumns; ++c) off |= nearest(weights[c], scale) * scale != weights[c];
  return off == 0;
}

// In eight sums, each of every eighth column.
double squared_error(const float* weights, float scale) {
  std::array<double, 8> sums{};
  for (std::uint32_t c = 0; c < kGroupColumns; c += sums.size()) {
    for (std::uint32_t i = 0; i < sums.size(); ++i) {
      const double error = double{nearest(weights[c + i], scale) * scale} - double{weights[c + i]};
      sums[i] += error * error;
    }
  }
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

int quantised4(float weight, float scale) { return scale == 0 ? 0 : static_cast<int>(nearest(weight, scale)); }

std::uint16_t scale_of_group(const float* weights) {
  const float largest = largest_of(weights);
  if (largest == 0) return 0;
  for (float q = kLowest; q < 0; ++q) {  // that the largest weight may stand for
    const std::uint16_t half = float_to_half(largest / q);
    const float scale = half_to_float(half);
    if (q * scale == largest && are_on_grid(weights, scale)) return half;
  }
  const float widest = half_to_float(float_to_half(largest / kLowest));
  std::uint16_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (const float cut : kCuts) {
    const std::uint16_t half = float_to_half(cut * widest);
    if ((half & 0x7FFF) == 0) continue;
    const double error = squared_error(weights, half_to_float(half));
    if (error < least) {
      best = half;
      least = error;
    }
  }
  return best;
}

}  // namespace owl
