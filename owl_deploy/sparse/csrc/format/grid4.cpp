#include "format/grid4.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "format/formats.h"
#include "format/half.h"

namespace owl {
namespace {

constexpr int kLowest = -8, kHighest = 7;
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

bool are_on_grid(const float* weights, float scale) {
  for (std::uint32_t c = 0; c < kGroupColumns; ++c) {
    if (static_cast<float>(quantised4(weights[c], scale)) * scale != weights[c]) return false;
  }
  return true;
}

double squared_error(const float* weights, float scale) {
  double sum = 0;
  for (std::uint32_t c = 0; c < kGroupColumns; ++c) {
    const double error = double{static_cast<float>(quantised4(weights[c], scale)) * scale} - double{weights[c]};
    sum += error * error;
  }
  return sum;
}

}  // namespace

int quantised4(float weight, float scale) {
  if (scale == 0) return 0;
  constexpr float kWholeNumbers = 0x1.8p23f;  // what a sum with it loses is the fraction; ties go to even
  const float rounded = (weight / scale + kWholeNumbers) - kWholeNumbers;
  return static_cast<int>(std::clamp(rounded, static_cast<float>(kLowest), static_cast<float>(kHighest)));
}

std::uint16_t scale_of_group(const float* weights) {
  const float largest = largest_of(weights);
  if (largest == 0) return 0;
  for (int q = kLowest; q < 0; ++q) {  // that the largest weight may stand for
    const std::uint16_t scale = float_to_half(largest / static_cast<float>(q));
    if (are_on_grid(weights, half_to_float(scale))) return scale;
  }
  const float widest = half_to_float(float_to_half(largest / kLowest));
  std::uint16_t best = 0;
  double least = squared_error(weights, 0);
  for (const float cut : kCuts) {
    const std::uint16_t scale = float_to_half(cut * widest);
    const double error = squared_error(weights, half_to_float(scale));
    if (error < least) {
      best = scale;
      least = error;
    }
  }
  return best;
}

}  // namespace owl
