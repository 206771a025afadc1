// What the parts of the self-test share: claims and failures, numbers, and matrices.
//
// Built with the address sanitizer, every array here is exactly as long as its callee may assume, and starts out as
// 0xFF bytes, which are NaN to whoever reads what nobody wrote.
#pragma once

#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "format/format.h"
#include "format/layout.h"
#include "format/pack.h"
#include "kernels/kernels.h"

namespace owl::selftest {

constexpr auto kFormats = [] {
  std::array<Format, Formats::count> all{};
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<Format>(i + 1);
  return all;
}();

inline std::uint64_t seed = 0;
inline std::string where;  // the case at hand

inline void say_where() {
  std::fprintf(stderr, "  seed %llu, %s\n", static_cast<unsigned long long>(seed), where.c_str());
}

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  std::fprintf(stderr, "FAILED: ");
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  say_where();
  std::exit(1);
}

[[gnu::format(printf, 1, 2)]] inline void claim(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  std::fflush(stdout);
}

// The same numbers on every machine, which the distributions of <random> are not.
class Random {
 public:
  explicit Random(std::uint64_t start) : state_(start) {}

  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
  std::uint64_t below(std::uint64_t end) { return bits() % end; }
  std::int64_t between(std::int64_t first, std::int64_t last) {
    return first + static_cast<std::int64_t>(below(static_cast<std::uint64_t>(last - first) + 1));
  }
  double unit() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  bool chance(double probability) { return unit() < probability; }
  float symmetric() { return static_cast<float>(unit() + unit() + unit() - 1.5); }
  template <class Items>
  auto pick(const Items& items) {
    return items[below(std::size(items))];
  }

 private:
  std::uint64_t state_;
};

template <class T>
class Array {
 public:
  explicit Array(std::size_t size) : size_(size), data_(new (std::align_val_t{kAlignment}) T[size]) {
    if (size != 0) std::memset(static_cast<void*>(data_.get()), 0xFF, size * sizeof(T));
  }
  T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) const { return data_.get()[i]; }
  bool same_bytes(const Array& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0;
  }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete[](data, std::align_val_t{kAlignment}); }
  };
  std::size_t size_;
  std::unique_ptr<T[], Free> data_;
};

// ---- Matrices ----

struct Matrix {
  std::uint32_t rows, columns;
  Format format;
  bool paired;
  std::vector<float> weights;

  float& at(std::uint32_t row, std::uint32_t column) { return weights[std::size_t{row} * columns + column]; }
};

inline const char* name_of(Format format) {
  return with_format(format, [](auto f) { return f.kName; });
}

inline void at_case(const char* what, std::int64_t number, const Matrix& m) {
  where = std::string(what) + " " + std::to_string(number) + ": " + std::to_string(m.rows) + " x " +
          std::to_string(m.columns) + " " + name_of(m.format) + (m.paired ? " paired" : "");
}

inline std::uint32_t random_side(Random& random) {
  static constexpr std::array<std::uint32_t, 16> kEdges = {1,  2,  15, 16,  17,  31,  32,  33,
                                                           63, 64, 65, 127, 128, 255, 256, 257};
  if (random.chance(0.4)) return random.pick(kEdges);
  return static_cast<std::uint32_t>(std::exp(random.unit() * std::log(600.0)));
}

// Every row and column has a density of its own, many of them 0 or 1.
inline std::vector<float> random_weights(Random& random, std::uint32_t rows, std::uint32_t columns) {
  const bool large = std::uint64_t{rows} * columns > 40'000;  // then sparse, to be quick
  const double density = large ? 0.03 : random.chance(0.1) ? 0 : random.chance(0.1) ? 1 : random.unit();
  const auto densities = [&](std::uint32_t count) {
    std::vector<double> all(count, 1);
    const double empty = random.chance(0.5) ? 0 : random.unit(), full = large || random.chance(0.5) ? 0 : random.unit();
    for (double& each : all) each = random.chance(empty) ? 0 : random.chance(full) ? 2 : 1;
    return all;
  };
  const std::vector<double> of_row = densities(rows), of_column = densities(columns);
  const auto magnitude = static_cast<int>(random.between(-20, 20)), spread = static_cast<int>(random.between(0, 10));
  std::vector<float> weights(std::size_t{rows} * columns);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double here = of_row[i / columns] * of_column[i % columns];
    const bool stored = here > 1 ? true : random.chance(here * density);
    if (stored) weights[i] = std::ldexp(random.symmetric(), magnitude + static_cast<int>(random.between(-spread, 0)));
  }
  return weights;
}

inline Matrix random_matrix(Random& random) {
  Matrix m{random_side(random), random_side(random), random.pick(kFormats), random.chance(0.4), {}};
  while (std::uint64_t{m.rows} * m.columns > 40'000) (m.rows > m.columns ? m.rows : m.columns) /= 2;
  if (m.paired) m.rows += m.rows % 2;
  m.weights = random_weights(random, m.rows, m.columns);
  return m;
}

inline Array<std::uint8_t> packed(const Matrix& m) {
  const char* problem = nullptr;
  const std::uint64_t most = most_bytes(m.rows, m.columns, m.format, m.paired, problem);
  if (problem != nullptr) fail("refused to pack: %s", problem);
  Array<std::uint8_t> room(most);
  std::memset(room.data(), 0xA5, most);  // which packing leaves nothing of
  const std::uint64_t bytes = pack(m.weights.data(), m.rows, m.columns, m.format, m.paired, room.data(), problem);
  if (problem != nullptr) fail("refused to pack: %s", problem);
  if (bytes > most) fail("takes more bytes than a matrix of its shape can");
  Array<std::uint8_t> out(bytes);
  std::memcpy(out.data(), room.data(), bytes);
  return out;
}

inline Packed parsed(const Array<std::uint8_t>& bytes) {
  Packed result{};
  if (const char* problem = parse(bytes.data(), bytes.size(), result)) fail("refused its own bytes: %s", problem);
  return result;
}

// ---- Products ----

// The scalar ones first, which the others are compared with.
inline std::vector<const Kernels*> all_kernels() {
  const auto best_first = runnable_kernels();
  return {best_first.rbegin(), best_first.rend()};
}

inline Array<float> random_inputs(Random& random, std::int64_t tokens, std::uint32_t columns) {
  Array<float> x(static_cast<std::size_t>(tokens) * columns);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const int magnitude = random.chance(0.2) ? static_cast<int>(random.between(-140, 20)) : 0;
    const double zeros = random.chance(0.2) ? random.unit() : 0, outliers = random.chance(0.3) ? 0.02 : 0;
    for (std::uint32_t c = 0; c < columns; ++c) {
      const int more = random.chance(outliers) ? 10 : 0;
      const float value = std::ldexp(random.symmetric(), magnitude + more);
      x[static_cast<std::size_t>(t) * columns + c] = random.chance(zeros) ? 0.0f : value;
    }
  }
  return x;
}

// All stages of a product. With `random`, the items of each stage in any order.
inline Array<float> multiply(const Kernels& kernels, const Packed& weights, const Array<float>& x, std::int64_t tokens,
                             Random* random = nullptr) {
  const Header& h = weights.header;
  const Way& way = kernels.way(h.format, tokens);
  Array<float> y(static_cast<std::size_t>(tokens * outputs(h)));
  const Array<std::byte> scratch(way.scratch_bytes(h, tokens)), workspace(way.workspace_bytes);
  const Product product{&weights, x.data(), y.data(), tokens, scratch.data()};
  for (int stage = 0; stage < way.stages(h, tokens); ++stage) {
    std::vector<std::int64_t> items(static_cast<std::size_t>(way.items(h, tokens, stage)));
    std::iota(items.begin(), items.end(), 0);
    for (std::size_t i = items.size(); random != nullptr && i > 1; --i) {
      std::swap(items[i - 1], items[random->below(i)]);
    }
    for (const std::int64_t item : items) way.run(product, stage, item, workspace.data());
  }
  return y;
}

// ---- The parts ----

// Unpacks to weights within bounds of those that were packed; returns them.
Array<float> check_unpacked(const Matrix& m, const Packed& packed);

void check_random_matrices(Random& random, std::int64_t rounds);
void check_edges(Random& random, std::int64_t rounds);
void check_largest_sums(Random& random);
void check_on_grid(Random& random, std::int64_t rounds);
void check_any_weights(Random& random, std::int64_t rounds);
void check_refused_weights(Random& random, std::int64_t rounds);
void check_wrong_headers(Random& random, std::int64_t rounds);
void check_mutations(Random& random, std::int64_t rounds);
void check_rewritten(Random& random, std::int64_t rounds);

}  // namespace owl::selftest
