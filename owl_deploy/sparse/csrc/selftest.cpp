// owl_selftest [seed [rounds]]: one line for each claim that holds; exits 1 at the first that does not.
//
// Build it with the address sanitizer: every array here is exactly as long as its callee may assume, and starts out
// as 0xFF bytes, which are NaN to whoever reads what nobody wrote.
#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "format.h"
#include "kernels.h"
#include "layout.h"
#include "library.h"
#include "pack.h"

namespace {

using namespace owl;

constexpr std::array kFormats = {Format::packed32, Format::packed16, Format::int8, Format::dense8};
constexpr std::array kNames = {"packed32", "packed16", "int8", "dense8"};

std::uint64_t seed = 0;
std::string where;  // the case at hand

void say_where() { std::fprintf(stderr, "  seed %llu, %s\n", static_cast<unsigned long long>(seed), where.c_str()); }

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  std::fprintf(stderr, "FAILED: ");
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  say_where();
  std::exit(1);
}

__attribute__((format(printf, 1, 2))) void claim(const char* format, ...) {
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

std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> all;
  for (const char* name : {"scalar", "avx2", "avx512", "neon"}) {
    if (const Kernels* kernels = find_kernels(name)) all.push_back(kernels);
  }
  return all;
}

// ---- Matrices ----

struct Matrix {
  std::uint32_t rows, columns;
  Format format;
  bool paired;
  std::vector<float> weights;

  float& at(std::uint32_t row, std::uint32_t column) { return weights[std::size_t{row} * columns + column]; }
};

const char* name_of(Format format) { return kNames[static_cast<std::size_t>(format) - 1]; }

void at_case(const char* what, std::int64_t number, const Matrix& m) {
  where = std::string(what) + " " + std::to_string(number) + ": " + std::to_string(m.rows) + " x " +
          std::to_string(m.columns) + " " + name_of(m.format) + (m.paired ? " paired" : "");
}

std::uint32_t random_side(Random& random) {
  static constexpr std::array<std::uint32_t, 16> kEdges = {1,  2,  15, 16,  17,  31,  32,  33,
                                                           63, 64, 65, 127, 128, 255, 256, 257};
  if (random.chance(0.4)) return random.pick(kEdges);
  return static_cast<std::uint32_t>(std::exp(random.unit() * std::log(600.0)));
}

// Every row and column has a density of its own, many of them 0 or 1.
std::vector<float> random_weights(Random& random, std::uint32_t rows, std::uint32_t columns) {
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

Matrix random_matrix(Random& random) {
  Matrix m{random_side(random), random_side(random), random.pick(kFormats), random.chance(0.4), {}};
  while (std::uint64_t{m.rows} * m.columns > 40'000) (m.rows > m.columns ? m.rows : m.columns) /= 2;
  if (m.paired) m.rows += m.rows % 2;
  m.weights = random_weights(random, m.rows, m.columns);
  return m;
}

Array<std::uint8_t> packed(const Matrix& m) {
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

Packed parsed(const Array<std::uint8_t>& bytes) {
  Packed result{};
  if (const char* problem = parse(bytes.data(), bytes.size(), result)) fail("refused its own bytes: %s", problem);
  return result;
}

// ---- What a weight becomes ----

bool is_within_bound(Format format, double weight, double found, double largest_of_row) {
  const double error = std::fabs(found - weight), size = std::fabs(weight);
  const double levels = format == Format::packed16 ? 1023 : 127;
  const double scale = std::max(largest_of_row / levels, double{FLT_MIN}), half = 0.5002 * scale;  // rounded arithmetic
  switch (format) {
    case Format::packed32: return found * weight > 0 && error <= std::max(size * 0x1p-19, 31 * 0x1p-149);
    case Format::packed16: return found * weight > 0 && error <= std::max(half, 1.0002 * scale - size);
    default: return error <= half;
  }
}

Array<float> check_unpacked(const Matrix& m, const Packed& packed) {
  const std::size_t size = m.weights.size();
  Array<float> weights(size);
  Array<std::uint8_t> mask(size);
  unpack(packed, weights.data(), mask.data());
  std::uint64_t nonzeros = 0;
  for (std::uint32_t row = 0; row < m.rows; ++row) {
    const float* wanted = m.weights.data() + std::size_t{row} * m.columns;
    float largest = 0;
    for (std::uint32_t c = 0; c < m.columns; ++c) largest = std::max(largest, std::fabs(wanted[c]));
    for (std::uint32_t c = 0; c < m.columns; ++c) {
      const std::size_t i = std::size_t{row} * m.columns + c;
      const bool stored = wanted[c] != 0;
      nonzeros += stored;
      if (mask[i] != (stored || m.format == Format::dense8)) fail("mask of row %u, column %u is wrong", row, c);
      if (stored ? !is_within_bound(m.format, wanted[c], weights[i], largest) : weights[i] != 0) {
        fail("row %u, column %u: %.9g became %.9g", row, c, double{wanted[c]}, double{weights[i]});
      }
    }
  }
  if (packed.header->nonzeros != nonzeros) fail("its header counts non-zeros wrong");
  Array<float> alone(size);
  unpack(packed, alone.data(), nullptr);
  if (!alone.same_bytes(weights)) fail("unpacks differently without a mask");
  return weights;
}

// ---- Products ----

Array<float> random_inputs(Random& random, std::int64_t tokens, std::uint32_t columns) {
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
Array<float> multiply(const Kernels& kernels, const Packed& weights, const Array<float>& x, std::int64_t tokens,
                      Random* random = nullptr) {
  Array<float> y(static_cast<std::size_t>(tokens * outputs(weights)));
  const Array<std::byte> scratch(scratch_bytes(kernels, weights, tokens));
  const Product product{&weights, x.data(), y.data(), tokens, scratch.data()};
  for (int stage = 0; stage < kStages; ++stage) {
    std::vector<std::int64_t> items(static_cast<std::size_t>(stage_items(kernels, weights, tokens, stage)));
    std::iota(items.begin(), items.end(), 0);
    for (std::size_t i = items.size(); random != nullptr && i > 1; --i) {
      std::swap(items[i - 1], items[random->below(i)]);
    }
    for (const std::int64_t item : items) kernels.run(product, stage, item);
  }
  return y;
}

struct Range {
  double value, error;
};

// What rounding may do to a row's sum. Few tokens meet 8-bit weights as 24-bit integers, in exact arithmetic; all
// other sums are fp32's, in any order. 8-bit products are allowed the larger of both errors.
Range row_times_token(Format format, const float* weights, const std::vector<std::uint32_t>& nonzeros, const float* x,
                      double largest) {
  double sum = 0, size = 0, weights_size = 0;
  for (const std::uint32_t c : nonzeros) {
    const double product = double{weights[c]} * x[c];
    sum += product;
    size += std::fabs(product);
    weights_size += std::fabs(double{weights[c]});
  }
  const auto count = static_cast<double>(nonzeros.size());
  const double error = (count + 8) * (0x1p-23 * size + 0x1p-148);
  if (is_packed(format)) return {sum, error};
  const double level = std::max(largest, 0x1p-100) / 8388607;
  return {sum, std::max(error, 1.5 * level * weights_size + 0x1p-22 * size + count * 0x1p-119)};
}

Range paired_range(Range gate, Range up) {
  const double silu = gate.value / (1 + std::exp(-gate.value));
  const double size = std::fabs(silu), up_size = std::fabs(up.value) + up.error;
  const double rounding = 0x1p-20 * size * up_size + 1e-35 * up_size + 0x1p-148;
  return {silu * up.value, 1.1 * gate.error * up_size + size * up.error + rounding};
}

// [tokens, outputs]
std::vector<Range> expected_product(const Matrix& m, const Array<float>& weights, const Array<float>& x,
                                    std::int64_t tokens) {
  std::vector<std::vector<std::uint32_t>> nonzeros(m.rows);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] != 0) nonzeros[i / m.columns].push_back(static_cast<std::uint32_t>(i % m.columns));
  }
  std::vector<Range> all;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float* inputs = x.data() + static_cast<std::size_t>(t) * m.columns;
    double largest = 0;
    for (std::uint32_t c = 0; c < m.columns; ++c) largest = std::max(largest, std::fabs(double{inputs[c]}));
    const auto row = [&](std::uint32_t r) {
      return row_times_token(m.format, weights.data() + std::size_t{r} * m.columns, nonzeros[r], inputs, largest);
    };
    const std::uint32_t outputs = m.paired ? m.rows / 2 : m.rows;
    for (std::uint32_t r = 0; r < outputs; ++r) {
      all.push_back(m.paired ? paired_range(row(r), row(outputs + r)) : row(r));
    }
  }
  return all;
}

constexpr std::int64_t kFew = 7;  // tokens that are few to any kernels, whatever the number they draw the line at

void check_products(Random& random, const Matrix& m, const Array<std::uint8_t>& bytes, const Packed& packed,
                    const Array<float>& weights, const Array<float>& x) {
  const auto tokens = static_cast<std::int64_t>(x.size() / m.columns);
  const std::vector<Range> wanted = expected_product(m, weights, x, tokens);
  std::unique_ptr<Array<float>> scalar;
  for (const Kernels* kernels : all_kernels()) {
    Array<float> y = multiply(*kernels, packed, x, tokens);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      if (std::fabs(y[i] - wanted[i].value) <= wanted[i].error) continue;
      const std::size_t outputs = wanted.size() / static_cast<std::size_t>(tokens);
      fail("%s, %lld tokens: output %zu of token %zu is %.9g, not %.9g +- %.3g", kernels->name,
           static_cast<long long>(tokens), i % outputs, i / outputs, double{y[i]}, wanted[i].value, wanted[i].error);
    }
    if (!multiply(*kernels, packed, x, tokens, &random).same_bytes(y)) {
      fail("%s, %lld tokens: the order of items matters", kernels->name, static_cast<long long>(tokens));
    }
    Array<float> by_threads(y.size());
    if (owl_product(bytes.data(), static_cast<std::int64_t>(bytes.size()), x.data(), by_threads.data(), tokens,
                    kernels->name, 2, 1) < 0) {
      fail("owl_product: %s", owl_error());
    }
    if (!by_threads.same_bytes(y)) {
      fail("%s, %lld tokens: two threads give other bits", kernels->name, static_cast<long long>(tokens));
    }
    if (scalar == nullptr) {
      scalar = std::make_unique<Array<float>>(std::move(y));
    } else if (tokens <= kFew && !is_packed(m.format) && !y.same_bytes(*scalar)) {
      fail("%s, %lld tokens: other bits than scalar", kernels->name, static_cast<long long>(tokens));
    }
  }
}

// A token that is not finite has outputs that are not, wherever a weight meets the culprit, and leaves others alone.
void check_infinite_input(Random& random, const Matrix& m, const Packed& packed, const Array<float>& weights,
                          std::int64_t tokens) {
  static constexpr std::array kCulprits = {HUGE_VALF, -HUGE_VALF, std::numeric_limits<float>::quiet_NaN()};
  const Array<float> x = random_inputs(random, tokens, m.columns);
  const auto token = static_cast<std::size_t>(random.between(0, tokens - 1)), width = std::size_t{m.columns};
  const auto column = static_cast<std::size_t>(random.below(m.columns));
  for (const Kernels* kernels : all_kernels()) {
    const float before = x[token * width + column];
    const Array<float> y = multiply(*kernels, packed, x, tokens);
    x[token * width + column] = random.pick(kCulprits);
    const Array<float> spoilt = multiply(*kernels, packed, x, tokens);
    x[token * width + column] = before;
    const std::size_t outputs = y.size() / static_cast<std::size_t>(tokens);
    for (std::size_t i = 0; i < y.size(); ++i) {
      if (i / outputs != token && std::memcmp(&y[i], &spoilt[i], sizeof(float)) != 0) {
        fail("%s: token %zu is not finite, and changes token %zu", kernels->name, token, i / outputs);
      }
      const bool meets = weights[i % outputs * width + column] != 0;
      if (i / outputs == token && meets && !m.paired && std::isfinite(spoilt[i])) {
        fail("%s: output %zu is finite, and its input is not", kernels->name, i % outputs);
      }
    }
  }
}

void check_matrix(Random& random, const Matrix& m) {
  const Array<std::uint8_t> bytes = packed(m);
  if (!packed(m).same_bytes(bytes)) fail("the same weights gave other bytes");
  const Packed parsed = ::parsed(bytes);
  const Array<float> weights = check_unpacked(m, parsed);
  const bool small = m.weights.size() < 10'000, large = m.weights.size() > 40'000;
  const std::int64_t few = random.between(1, kFew), most = large ? 15 : 70;
  const std::int64_t more = small && random.chance(0.3) ? random.between(124, 136) : random.between(kFew + 1, most);
  for (const std::int64_t tokens : {few, more}) {
    check_products(random, m, bytes, parsed, weights, random_inputs(random, tokens, m.columns));
  }
  check_infinite_input(random, m, parsed, weights, random.chance(0.7) ? few : random.between(16, 60));
}

// What random shapes are unlikely to be: single rows and columns; full slices, and one row more; more panels than one,
// and more partial sums than one thread adds up; more columns than 8-bit sums take at once.
void check_edges(Random& random, std::int64_t rounds) {
  static constexpr std::array<std::pair<std::uint32_t, std::uint32_t>, 10> kShapes = {
      {{1, 1}, {1, 4200}, {2, 2112}, {18, 2049}, {1100, 1}, {512, 33}, {514, 32}, {16, 256}, {32, 257}, {288, 1500}}};
  for (std::int64_t i = 0; i < rounds; ++i) {
    const auto [rows, columns] = kShapes[static_cast<std::size_t>(i) % kShapes.size()];
    // In 20 rounds each shape meets two formats, and in 40 all; the largest only those with panels.
    const auto turn = static_cast<std::size_t>(i) / kShapes.size() + static_cast<std::size_t>(i);
    const Format format = kFormats[turn % (rows == 288 ? 2 : kFormats.size())];
    const Matrix m{rows, columns, format, rows % 2 == 0 && random.chance(0.5), random_weights(random, rows, columns)};
    at_case("edge", i, m);
    check_matrix(random, m);
  }
  claim("%lld matrices at the edges of slices, panels and blocks: the same", static_cast<long long>(rounds));
}

// The largest sums that 8-bit weights and 24-bit inputs can have, over more columns than 32 bits have room for.
void check_largest_sums(Random& random) {
  for (const Format format : {Format::int8, Format::dense8}) {
    Matrix m{4, 5000, format, false, std::vector<float>(std::size_t{4} * 5000, 1)};
    for (std::uint32_t c = 0; c < m.columns; ++c) {
      m.at(1, c) = -1;
      m.at(2, c) = c % 2 == 0 ? 1 : -1;
      m.at(3, c) = c < m.columns / 2 ? 1 : -1;
    }
    at_case("largest sums", 0, m);
    const Array<std::uint8_t> bytes = packed(m);
    const Packed parsed = ::parsed(bytes);
    const Array<float> weights = check_unpacked(m, parsed), x(std::size_t{4} * m.columns);
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = i / m.columns % 2 == 0 ? 1 : -1;
      if (i / m.columns >= 2 && i % 2 == 1) x[i] = -x[i];
    }
    check_products(random, m, bytes, parsed, weights, x);
  }
  claim("8-bit products of the largest weights and inputs: the same");
}

void check_random_matrices(Random& random, std::int64_t rounds) {
  std::string names;
  for (const Kernels* kernels : all_kernels()) names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  for (std::int64_t i = 0; i < rounds; ++i) {
    const Matrix m = random_matrix(random);
    at_case("matrix", i, m);
    check_matrix(random, m);
  }
  claim("%lld random matrices: packed twice to the same bytes; unpacked to their mask, and to weights within bounds",
        static_cast<long long>(rounds));
  claim("products of %s: as in double precision; the same bits whatever the order of items and the threads",
        names.c_str());
  claim("8-bit products of few tokens: the same bits on all of them");
  claim("an input that is not finite shows in what it meets, and nowhere in other tokens");
}

// ---- What can be packed ----

// Weights of any bits that are finite: denormals, the largest, and numbers around the steps of 5 index bits.
void check_any_weights(Random& random, std::int64_t rounds) {
  for (std::int64_t i = 0; i < rounds; ++i) {
    Matrix m = random_matrix(random);
    at_case("any weights", i, m);
    const auto exponent = static_cast<std::uint32_t>(random.pick(std::array{0, 1, 2, 127, 253, 254}));
    for (float& weight : m.weights) {
      auto bits = static_cast<std::uint32_t>(random.bits());
      if (random.chance(0.5)) bits = (bits & 0x807FFFFF) | exponent << 23;
      if (random.chance(0.2)) bits |= 0x007FFFE0;
      if (random.chance(0.2)) bits &= 0xFF80003F;
      std::memcpy(&weight, &bits, sizeof(weight));
      if (!std::isfinite(weight) || random.chance(0.5)) weight = random.chance(0.5) ? 0.0f : -0.0f;
    }
    const Array<std::uint8_t> bytes = packed(m);
    check_unpacked(m, parsed(bytes));
  }
  claim("%lld matrices of any finite weights, denormal or huge: the same", static_cast<long long>(rounds));
}

void check_refused_weights(Random& random, std::int64_t rounds) {
  const auto refuses = [](const Matrix& m, std::uint64_t rows, std::uint64_t columns, bool paired, const char* why) {
    const char* problem = nullptr;
    const std::uint64_t most = most_bytes(rows, columns, m.format, paired, problem);
    Array<std::uint8_t> room(most);
    if (problem == nullptr) pack(m.weights.data(), rows, columns, m.format, paired, room.data(), problem);
    if (problem == nullptr || std::strstr(problem, why) == nullptr) {
      fail("%s: %s", why, problem == nullptr ? "not refused" : problem);
    }
  };
  for (std::int64_t i = 0; i < rounds; ++i) {
    Matrix m = random_matrix(random);
    at_case("refused weights", i, m);
    refuses(m, 0, m.columns, false, "a side is 0");
    refuses(m, m.rows, 0, false, "a side is 0");
    refuses(m, kMaxSize + 1, m.columns, false, "a side is 0 or over 2^24");
    refuses(m, m.rows, ~std::uint64_t{0}, false, "a side is 0 or over 2^24");
    if (m.rows % 2 == 1) refuses(m, m.rows, m.columns, true, "odd number of rows");
    m.weights[random.below(m.weights.size())] = random.pick(std::array{HUGE_VALF, -HUGE_VALF, NAN});
    refuses(m, m.rows, m.columns, m.paired, "infinite or not a number");
  }
  claim("infinite weights, NaN, and impossible shapes: refused");
}

// ---- Damaged matrices ----

constexpr std::array<std::uint8_t, 14> kBytes = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 0x7F, 0x80, 0xFE, 0xFF};
constexpr std::array<std::uint32_t, 26> kNumbers = {
    0,   1,   2,   15,  16,  17,  31,      32,      33,            63,         64,         65,         128,
    240, 255, 256, 257, 272, 512, 1 << 16, 1 << 24, (1 << 24) + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFC0, 0xFFFFFFFF};

using Bytes = std::vector<std::uint8_t>;

template <class T>
T read(const Bytes& bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}

template <class T>
void write(Bytes& bytes, std::size_t at, T value) {
  if (at + sizeof(value) <= bytes.size()) std::memcpy(bytes.data() + at, &value, sizeof(value));
}

constexpr std::array kSides = {&Header::rows, &Header::columns, &Header::slice_rows, &Header::panel_columns};

// The counts that follow from a shape, in the reader's own arithmetic: where it overflows, too.
void set_counts(Header& h) {
  const std::uint32_t halves = h.paired ? 2 : 1;
  if (h.slice_rows / halves != 0) h.slices = ceil_div(h.rows / halves, h.slice_rows / halves);
  if (h.panel_columns != 0) h.panels = ceil_div(h.columns, h.panel_columns);
}

void reshape(Random& random, Bytes& bytes) {
  if (bytes.size() < sizeof(Header)) return;
  auto h = read<Header>(bytes, 0);
  for (const auto side : kSides) {
    if (random.chance(0.6)) continue;
    const auto moved = h.*side + static_cast<std::uint32_t>(random.between(-64, 64));
    h.*side = random.chance(0.5) ? random.pick(kNumbers) : moved;
  }
  if (random.chance(0.1)) h.format = random.pick(kFormats);
  if (random.chance(0.1)) h.paired ^= 1;
  set_counts(h);
  write(bytes, 0, h);
}

void mutate(Random& random, Bytes& bytes, std::size_t units) {
  const auto anywhere = [&] { return random.below(bytes.size()); };
  const auto unit = [&] { return sizeof(Header) + random.below(units + 1) * sizeof(std::uint64_t); };
  for (std::uint64_t more = 1 + random.below(3); more > 0 && !bytes.empty(); --more) {
    switch (random.below(13)) {
      case 0: bytes[anywhere()] ^= static_cast<std::uint8_t>(1U << random.below(8)); break;
      case 1: bytes[anywhere()] = random.pick(kBytes); break;
      case 2: bytes[random.below(std::min(bytes.size(), sizeof(Header)))] = random.pick(kBytes); break;
      case 3: write(bytes, random.below(8) * 4, random.pick(kNumbers)); break;
      case 4: {
        const std::uint64_t number = random.chance(0.5) ? random.pick(kNumbers) : random.bits() >> random.below(64);
        write(bytes, 32 + random.below(4) * 8, random.chance(0.5) ? number : 0 - number);
        break;
      }
      case 5: {
        const std::size_t a = unit(), b = unit();
        if (std::max(a, b) + 8 > bytes.size()) break;
        const auto first = read<std::uint64_t>(bytes, a), second = read<std::uint64_t>(bytes, b);
        write(bytes, a, second);
        write(bytes, b, random.chance(0.7) ? first : random.bits());
        break;
      }
      case 6: {
        const std::size_t at = unit();
        if (at + 8 > bytes.size()) break;
        const auto moved = static_cast<std::uint64_t>(random.between(-3, 3) * 64);
        write(bytes, at, read<std::uint64_t>(bytes, at) + moved);
        break;
      }
      case 7: {
        const std::size_t at = anywhere(), end = std::min(bytes.size(), at + random.below(200));
        for (std::size_t i = at; i < end; ++i) bytes[i] = static_cast<std::uint8_t>(random.bits());
        break;
      }
      case 8: {
        const std::size_t from = anywhere(), to = anywhere();
        const std::size_t length = std::min(bytes.size() - std::max(from, to), random.below(200));
        std::memmove(bytes.data() + to, bytes.data() + from, length);
        break;
      }
      case 9: bytes.resize(random.chance(0.5) ? anywhere() : bytes.size() - std::min<std::size_t>(bytes.size(), 64));
        break;
      case 10: bytes.resize(bytes.size() + random.below(130), static_cast<std::uint8_t>(random.bits())); break;
      case 11: {  // keeps a permutation one, and the steps of a block
        const std::size_t a = anywhere(), b = std::min(bytes.size() - 1, a + random.below(40));
        std::swap(bytes[a], bytes[b]);
        break;
      }
      case 12: reshape(random, bytes); break;
    }
  }
  if (random.chance(0.7)) write(bytes, offsetof(Header, bytes), std::uint64_t{bytes.size()});
}

// Whatever the bytes are: refused, or harmless. Returns whether they were accepted.
bool survives(Random& random, const Bytes& bytes, std::int64_t tokens) {
  Array<std::uint8_t> exact(bytes.size());
  if (!bytes.empty()) std::memcpy(exact.data(), bytes.data(), bytes.size());
  Packed packed{};
  if (parse(exact.data(), exact.size(), packed) != nullptr) return false;
  const Header& h = *packed.header;
  const std::uint64_t size = std::uint64_t{h.rows} * h.columns;
  if (size > 32 * bytes.size()) fail("accepted %u x %u weights in %zu bytes", h.rows, h.columns, bytes.size());
  const Array<float> weights(size);
  const Array<std::uint8_t> mask(size);
  unpack(packed, weights.data(), mask.data());
  const Array<float> x = random_inputs(random, tokens, h.columns);
  if (random.chance(0.1)) x[random.below(x.size())] = random.pick(std::array{HUGE_VALF, NAN});
  for (const Kernels* kernels : all_kernels()) multiply(*kernels, packed, x, tokens);
  return true;
}

// All header bytes at their extremes, all sides of the matrix at many, and all lengths: of one matrix in each round, up
// to each format in two shapes.
void check_wrong_headers(Random& random, std::int64_t rounds) {
  static constexpr std::array<std::pair<std::uint32_t, std::uint32_t>, 2> kShapes = {{{18, 70}, {8, 520}}};
  std::int64_t tried = 0, accepted = 0;
  const auto attempt = [&](const Bytes& bytes) {
    accepted += survives(random, bytes, 1);
    ++tried;
  };
  for (std::size_t i = 0; i < std::min<std::size_t>(kFormats.size() * kShapes.size(), rounds); ++i) {
    const auto [rows, columns] = kShapes[(i + i / kFormats.size()) % kShapes.size()];
    const Format format = kFormats[i % kFormats.size()];
    const Matrix m{rows, columns, format, rows == 18, random_weights(random, rows, columns)};
    const Array<std::uint8_t> array = packed(m);
    const Bytes whole(array.data(), array.data() + array.size());
    const auto header = read<Header>(whole, 0);

    at_case("address", 1, m);
    const Array<std::uint8_t> elsewhere(whole.size() + 1);
    std::memcpy(elsewhere.data() + 1, whole.data(), whole.size());
    Packed unaligned{};
    if (parse(elsewhere.data() + 1, whole.size(), unaligned) == nullptr) fail("accepted bytes that are not aligned");

    for (std::size_t at = 0; at < sizeof(Header); ++at) {
      for (const std::uint8_t value : {0, 1, 0x7F, 0x80, 0xFF}) {
        at_case("header byte", static_cast<std::int64_t>(at) * 256 + value, m);
        Bytes bytes = whole;
        bytes[at] = value;
        attempt(bytes);
      }
    }
    for (const auto side : kSides) {
      for (const std::uint32_t value : kNumbers) {
        at_case("shape with", value, m);
        Header other = header;
        other.*side = value;
        set_counts(other);
        Bytes bytes = whole;
        write(bytes, 0, other);
        attempt(bytes);
      }
    }
    for (std::size_t length = 0; length < whole.size(); length += rows == 18 ? 1 : 61) {
      at_case("length", static_cast<std::int64_t>(length), m);
      Bytes bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(length));
      if (survives(random, bytes, 1)) fail("accepted only %zu of %zu bytes", length, whole.size());
      write(bytes, offsetof(Header, bytes), std::uint64_t{length});
      if (survives(random, bytes, 1)) fail("accepted %zu of %zu bytes", length, whole.size());
      tried += 2;
    }
  }
  claim("%lld wrong headers, shapes and lengths: %lld harmless, the others refused", static_cast<long long>(tried),
        static_cast<long long>(accepted));
}

void check_mutations(Random& random, std::int64_t rounds) {
  static constexpr std::array<std::pair<std::uint32_t, std::uint32_t>, 6> kShapes = {
      {{2, 3}, {18, 70}, {40, 64}, {258, 20}, {8, 520}, {34, 290}}};
  std::int64_t tried = 0, accepted = 0;
  for (const Format format : kFormats) {
    for (const auto& [rows, columns] : kShapes) {
      const Matrix m{rows, columns, format, random.chance(0.5), random_weights(random, rows, columns)};
      const Array<std::uint8_t> array = packed(m);
      const Header& h = *parsed(array).header;
      for (std::int64_t i = 0; i < 4 * rounds; ++i) {
        at_case("mutation", i, m);
        Bytes bytes(array.data(), array.data() + array.size());
        mutate(random, bytes, std::size_t{h.slices} * h.panels);
        accepted += survives(random, bytes, random.chance(0.1) ? 17 : random.pick(std::array{1, 1, 1, 2, 3, 7}));
        ++tried;
      }
    }
  }
  claim("%lld other mutations: %lld harmless, the others refused", static_cast<long long>(tried),
        static_cast<long long>(accepted));
}

}  // namespace

int main(int count, char** arguments) {
  seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(say_where);
#endif
  const std::int64_t rounds = count > 2 ? std::max(1LL, std::strtoll(arguments[2], nullptr, 10)) : 100;
  // Each with random numbers of its own, so that a change of one leaves the others' cases as they are.
  Random edges(seed * 8), matrices(seed * 8 + 1), any(seed * 8 + 2), refused(seed * 8 + 3);
  Random headers(seed * 8 + 4), mutations(seed * 8 + 5);
  check_random_matrices(matrices, rounds);
  check_edges(edges, rounds);
  check_largest_sums(edges);
  check_any_weights(any, rounds);
  check_refused_weights(refused, rounds);
  check_wrong_headers(headers, rounds);
  check_mutations(mutations, rounds);
}
