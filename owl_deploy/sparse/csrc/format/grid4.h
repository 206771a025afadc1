// The grid of 4-bit weights: an integer from -8 to 7 times its group's scale, which has a sign.
#pragma once

#include <cstdint>

namespace owl {

// A group's scale as fp16: one by which all of its weights are on the grid, if there is one, and otherwise that of the
// least error among a few. `weights` are finite, and 0 where the matrix has none.
std::uint16_t scale_of_group(const float* weights);

// Of one weight, the integer of the nearest point; 0 where the scale is.
int quantised4(float weight, float scale);

}  // namespace owl
