// Products, of all kernels and threads, against double precision and each other.
#include <algorithm>
#include <limits>

#include "library.h"
#include "selftest/harness.h"

namespace owl::selftest {
namespace {

bool is_of_bytes(Format format) {
  return with_format(format, [](auto f) { return OfBytes<decltype(f)>; });
}

bool is_of_nibbles(Format format) {
  return with_format(format, [](auto f) { return OfNibbles<decltype(f)>; });
}

struct Range {
  double value, error;
};

// What rounding may do to a row's sum. Few tokens meet 8-bit weights as 24-bit integers, in exact arithmetic; all
// other sums are fp32's, in any order. 8-bit products are allowed the larger of both errors. 4-bit weights meet 16-bit
// integers, which have a scale for each group of columns.
Range row_times_token(Format format, const float* weights, const std::vector<std::uint32_t>& nonzeros, const float* x,
                      double largest, const std::vector<double>& largest_of_groups) {
  double sum = 0, size = 0, weights_size = 0, rounded = 0;
  for (const std::uint32_t c : nonzeros) {
    const double product = double{weights[c]} * x[c];
    sum += product;
    size += std::fabs(product);
    weights_size += std::fabs(double{weights[c]});
    const double level = std::max(largest_of_groups[c / kGroupColumns], 0x1p-80) / 32639;
    rounded += std::fabs(double{weights[c]}) * 0.501 * level;
  }
  const auto count = static_cast<double>(nonzeros.size());
  const double error = (count + 8) * (0x1p-23 * size + 0x1p-148);
  if (is_of_nibbles(format)) return {sum, error + rounded};
  if (!is_of_bytes(format)) return {sum, error};
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
    std::vector<double> largest_of_groups(ceil_div(m.columns, kGroupColumns));
    for (std::uint32_t c = 0; c < m.columns; ++c) {
      const double size = std::fabs(double{inputs[c]});
      largest = std::max(largest, size);
      largest_of_groups[c / kGroupColumns] = std::max(largest_of_groups[c / kGroupColumns], size);
    }
    const auto row = [&](std::uint32_t r) {
      return row_times_token(m.format, weights.data() + std::size_t{r} * m.columns, nonzeros[r], inputs, largest,
                             largest_of_groups);
    };
    const std::uint32_t outputs = m.paired ? m.rows / 2 : m.rows;
    for (std::uint32_t r = 0; r < outputs; ++r) {
      all.push_back(m.paired ? paired_range(row(r), row(outputs + r)) : row(r));
    }
  }
  return all;
}

constexpr std::int64_t kFew = 7;  // tokens that are few to any kernels, whatever the number they draw the line at

bool has_exact_sums(Format format, std::int64_t tokens) {
  return is_of_nibbles(format) || (is_of_bytes(format) && tokens <= kFew);
}

// The last token's outputs are those that it has alone.
void check_alone(const Kernels& kernels, const Matrix& m, const Packed& packed, const Array<float>& x,
                 const Array<float>& y) {
  const Array<float> last(m.columns);
  std::memcpy(last.data(), x.data() + x.size() - m.columns, m.columns * sizeof(float));
  const Array<float> alone = multiply(kernels, packed, last, 1);
  if (std::memcmp(alone.data(), y.data() + y.size() - alone.size(), alone.size() * sizeof(float)) != 0) {
    fail("%s: a token has other outputs alone than among others", kernels.name);
  }
}

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
    if (is_of_nibbles(m.format) && tokens > 1) check_alone(*kernels, m, packed, x, y);
    if (scalar == nullptr) {
      scalar = std::make_unique<Array<float>>(std::move(y));
    } else if (has_exact_sums(m.format, tokens) && !y.same_bytes(*scalar)) {
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
  const Packed parsed = selftest::parsed(bytes);
  const Array<float> weights = check_unpacked(m, parsed);
  const bool small = m.weights.size() < 10'000, large = m.weights.size() > 40'000;
  const std::int64_t few = random.between(1, kFew), most = large ? 15 : 70;
  const std::int64_t more = small && random.chance(0.3) ? random.between(124, 136) : random.between(kFew + 1, most);
  for (const std::int64_t tokens : {few, more}) {
    check_products(random, m, bytes, parsed, weights, random_inputs(random, tokens, m.columns));
  }
  check_infinite_input(random, m, parsed, weights, random.chance(0.7) ? few : random.between(16, 60));
}

}  // namespace

// What random shapes are unlikely to be: single rows and columns; full slices, and one row more; more panels than one,
// and more partial sums than one thread adds up; more columns than 8-bit sums take at once.
void check_edges(Random& random, std::int64_t rounds) {
  static constexpr std::array<std::pair<std::uint32_t, std::uint32_t>, 10> kShapes = {
      {{1, 1}, {1, 4200}, {2, 2112}, {18, 2049}, {1100, 1}, {512, 33}, {514, 32}, {16, 256}, {32, 257}, {288, 1500}}};
  for (std::int64_t i = 0; i < rounds; ++i) {
    const auto [rows, columns] = kShapes[static_cast<std::size_t>(i) % kShapes.size()];
    // In 20 rounds each shape meets two formats, and in 60 all; the largest only those with panels.
    const auto turn = static_cast<std::size_t>(i) / kShapes.size() + static_cast<std::size_t>(i);
    const Format format = kFormats[turn % (rows == 288 ? 2 : kFormats.size())];
    const Matrix m{rows, columns, format, rows % 2 == 0 && random.chance(0.5), random_weights(random, rows, columns)};
    at_case("edge", i, m);
    check_matrix(random, m);
  }
  claim("%lld matrices at the edges of slices, panels and blocks: the same", static_cast<long long>(rounds));
}

// The largest sums that integers can have, over more columns than 32 bits have room for.
void check_largest_sums(Random& random) {
  for (const Format format : {Format::int8, Format::dense8, Format::int4, Format::dense4}) {
    Matrix m{4, 5000, format, false, std::vector<float>(std::size_t{4} * 5000, 1)};
    for (std::uint32_t c = 0; c < m.columns; ++c) {
      m.at(1, c) = -1;
      m.at(2, c) = c % 2 == 0 ? 1 : -1;
      m.at(3, c) = c < m.columns / 2 ? 1 : -1;
    }
    at_case("largest sums", 0, m);
    const Array<std::uint8_t> bytes = packed(m);
    const Packed parsed = selftest::parsed(bytes);
    const Array<float> weights = check_unpacked(m, parsed), x(std::size_t{4} * m.columns);
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = i / m.columns % 2 == 0 ? 1 : -1;
      if (i / m.columns >= 2 && i % 2 == 1) x[i] = -x[i];
    }
    check_products(random, m, bytes, parsed, weights, x);
  }
  claim("8- and 4-bit products of the largest weights and inputs: the same");
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
  claim("8-bit products of few tokens, and 4-bit products of any number: the same bits on all of them");
  claim("4-bit products: a token has the same bits alone and among others");
  claim("an input that is not finite shows in what it meets, and nowhere in other tokens");
}

}  // namespace owl::selftest
