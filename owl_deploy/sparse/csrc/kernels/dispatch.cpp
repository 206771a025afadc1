#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstring>

#include "kernels/kernels.h"

namespace owl {

#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx512Kernels, kAvx2Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif
extern const Kernels kScalarKernels;

namespace {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows it.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

class Choices {
 public:
  Choices() {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && has_f16c();
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni")) {
      add(kAvx512Kernels);
    }
    if (avx2) add(kAvx2Kernels);
#elif defined(__aarch64__)
    add(kNeonKernels);
#endif
    add(kScalarKernels);
  }

  std::span<const Kernels* const> all() const { return {all_.data(), count_}; }

 private:
  void add(const Kernels& kernels) { all_[count_++] = &kernels; }

  std::array<const Kernels*, 3> all_{};
  std::size_t count_ = 0;
};

}  // namespace

const Way& Kernels::way(Format format, std::int64_t tokens) const {
  const auto& of_format = ways[static_cast<std::size_t>(format) - 1];
  std::size_t last = 0;
  for (std::size_t i = 1; i < kWays; ++i) {
    if (tokens >= of_format[i].from_tokens) last = i;
  }
  return of_format[last];
}

std::span<const Kernels* const> runnable_kernels() {
  static const Choices choices;
  return choices.all();
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* kernels : runnable_kernels()) {
    if (name == nullptr || *name == '\0' || std::strcmp(name, kernels->name) == 0) return kernels;
  }
  return nullptr;
}

}  // namespace owl
