// Products of a packed matrix: y = W x for one token or many, on the best instruction set there is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

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

// From how many tokens on a product is made the way of many tokens (see product.h): where it is measured to be faster.
struct ManyTokens {
  std::int64_t packed, eight_bit;

  bool are(const Header& h, std::int64_t tokens) const { return tokens >= (is_packed(h.format) ? packed : eight_bit); }
};

struct Kernels {
  const char* name;  // "avx512", "avx2", "neon" or "scalar"
  ManyTokens many;
  void (*run)(const Product& product, int stage, std::int64_t item);
};

std::size_t scratch_bytes(const Kernels& kernels, const Packed& weights, std::int64_t tokens);
std::int64_t stage_items(const Kernels& kernels, const Packed& weights, std::int64_t tokens, int stage);

// The kernels called `name`, or the best this CPU can run if it is null or empty; null if it cannot run those.
const Kernels* find_kernels(const char* name);

static inline std::int64_t outputs(const Packed& weights) {
  return weights.header->paired ? weights.header->rows / 2 : weights.header->rows;
}

}  // namespace owl
