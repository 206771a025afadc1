#include <cstring>

#include "product.h"

namespace owl {

#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx512Kernels, kAvx2Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif
extern const Kernels kScalarKernels;

namespace {

struct Choice {
  const Kernels* kernels;
  bool can_run;
};

// Best first.
const Choice* choices() {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
#endif
  static const Choice all[] = {
#if defined(__x86_64__)
      {&kAvx512Kernels, avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni")},
      {&kAvx2Kernels, avx2},
#elif defined(__aarch64__)
      {&kNeonKernels, true},
#endif
      {&kScalarKernels, true},
      {nullptr, false},
  };
  return all;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const Choice* choice = choices(); choice->kernels != nullptr; ++choice) {
    const bool wanted = name == nullptr || *name == '\0' || std::strcmp(name, choice->kernels->name) == 0;
    if (choice->can_run && wanted) return choice->kernels;
  }
  return nullptr;
}

std::size_t scratch_bytes(const Kernels& kernels, const Packed& weights, std::int64_t tokens) {
  const Header& h = *weights.header;
  return kernels.many.are(h, tokens) ? Tiles(h, tokens).bytes() : Inputs(h, tokens).bytes(tokens);
}

std::int64_t stage_items(const Kernels& kernels, const Packed& weights, std::int64_t tokens, int stage) {
  const Header& h = *weights.header;
  const auto units = std::int64_t{h.slices} * h.panels;
  if (tokens <= 0) return 0;
  if (kernels.many.are(h, tokens)) {
    const Tiles tiles(h, tokens);
    if (stage == 0) return tiles.count * ceil_div(tiles.columns, kTransposed);
    return stage == 1 ? tiles.count * Slices::items(h) : 0;
  }
  if (stage == 0) return 1;
  if (stage == 1) return units;
  if (h.panels == 1) return 0;
  return tokens * h.rows * h.panels <= kSerialSums ? 1 : std::int64_t{h.slices};
}

}  // namespace owl
