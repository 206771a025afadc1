// Products of a packed matrix: y = W x for one token or many, on the best instruction set there is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace owl {

// One product. `x` is [tokens, columns] and `y` [tokens, outputs], both row-major and dense; outputs is rows, or
// half of them where the matrix is paired.
struct Product {
  const Packed* weights;
  const float* x;
  float* y;
  std::int64_t tokens;
  std::byte* scratch;  // scratch_bytes(), aligned to 64
};

// A product is made in stages, one after the other; the items of a stage are independent of each other, and may run
// on any threads in any order. The result does not depend on how many there are.
inline constexpr int kStages = 3;

std::size_t scratch_bytes(const Packed& weights, std::int64_t tokens);
std::int64_t stage_items(const Packed& weights, std::int64_t tokens, int stage);

struct Kernels {
  const char* name;  // "avx512", "avx2", "neon" or "scalar"
  void (*run)(const Product& product, int stage, std::int64_t item);
};

// The kernels called `name`, or the best this CPU can run if it is null or empty; null if it cannot run those.
const Kernels* find_kernels(const char* name);

static inline std::int64_t outputs(const Packed& weights) {
  return weights.header->paired ? weights.header->rows / 2 : weights.header->rows;
}

}  // namespace owl
