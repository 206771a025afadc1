// Products of a packed matrix: y = W x for one token or many, on the best instruction set there is.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "format/layout.h"

namespace owl {

// One product. `x` is [tokens, columns] and `y` [tokens, outputs], both row-major and dense; outputs is rows, or
// half of them where the matrix is paired.
struct Product {
  const Packed* weights;
  const float* x;
  float* y;
  std::int64_t tokens;
  std::byte* scratch;  // of the way's scratch_bytes, aligned to 64
};

// One way to make the products of one format. A product is made in stages, one after the other; the items of a stage
// are independent of each other, and may run on any threads in any order. The result does not depend on how many there
// are. Nothing here throws.
struct Way {
  std::int64_t from_tokens;  // from how many on it is the way to take, as measured
  int (*stages)(const Header& h, std::int64_t tokens);
  std::int64_t (*items)(const Header& h, std::int64_t tokens, int stage);
  std::size_t (*scratch_bytes)(const Header& h, std::int64_t tokens);
  std::size_t workspace_bytes;  // that each thread needs for its item, aligned to 64: too many for its stack
  void (*run)(const Product& product, int stage, std::int64_t item, std::byte* workspace);
};

inline constexpr std::size_t kWays = 2;  // few tokens, many

struct Kernels {
  const char* name;  // "avx512", "avx2", "neon" or "scalar"
  std::array<std::array<Way, kWays>, Formats::count> ways;  // by format, and from how many tokens on

  const Way& way(Format format, std::int64_t tokens) const;
};

// The kernels that this CPU can run, best first.
std::span<const Kernels* const> runnable_kernels();

// Those called `name`, or the best if it is null or empty; null if this CPU cannot run them.
const Kernels* find_kernels(const char* name);

}  // namespace owl
