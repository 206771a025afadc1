// What a weight becomes, and what can be packed.
#include <algorithm>
#include <cfloat>

#include "format/half.h"
#include "selftest/harness.h"

namespace owl::selftest {
namespace {

bool is_within_bound(Format format, double weight, double found, double largest_of_row, double largest_of_group) {
  const double error = std::fabs(found - weight), size = std::fabs(weight);
  const double levels = format == Format::packed16 ? 1023 : 127;
  const double scale = std::max(largest_of_row / levels, double{FLT_MIN}), half = 0.5002 * scale;  // rounded arithmetic
  switch (format) {
    case Format::packed32: return found * weight > 0 && error <= std::max(size * 0x1p-19, 31 * 0x1p-149);
    case Format::packed16: return found * weight > 0 && error <= std::max(half, 1.0002 * scale - size);
    case Format::int4:
    case Format::dense4:  // the largest may be cut to 0.7, and has 7 steps on one side; scales are fp16's, to 65504
      return error <= std::max(0.4 * largest_of_group + 0x1p-21, largest_of_group > 8 * 65504.0 ? size : 0);
    default: return error <= half;
  }
}

}  // namespace

Array<float> check_unpacked(const Matrix& m, const Packed& packed) {
  const std::size_t size = m.weights.size();
  Array<float> weights(size);
  Array<std::uint8_t> mask(size);
  unpack(packed, weights.data(), mask.data());
  std::uint64_t nonzeros = 0;
  const bool is_dense = m.format == Format::dense8 || m.format == Format::dense4;
  for (std::uint32_t row = 0; row < m.rows; ++row) {
    const float* wanted = m.weights.data() + std::size_t{row} * m.columns;
    float largest = 0, largest_of_group = 0;
    for (std::uint32_t c = 0; c < m.columns; ++c) largest = std::max(largest, std::fabs(wanted[c]));
    for (std::uint32_t c = 0; c < m.columns; ++c) {
      const std::size_t i = std::size_t{row} * m.columns + c;
      const bool stored = wanted[c] != 0;
      nonzeros += stored;
      if (mask[i] != (stored || is_dense)) fail("mask of row %u, column %u is wrong", row, c);
      if (c % kGroupColumns == 0) {
        largest_of_group = 0;
        for (std::uint32_t g = c; g < std::min(m.columns, c + kGroupColumns); ++g) {
          largest_of_group = std::max(largest_of_group, std::fabs(wanted[g]));
        }
      }
      if (stored ? !is_within_bound(m.format, wanted[c], weights[i], largest, largest_of_group) : weights[i] != 0) {
        fail("row %u, column %u: %.9g became %.9g", row, c, double{wanted[c]}, double{weights[i]});
      }
    }
  }
  if (packed.header.nonzeros != nonzeros) fail("its header counts non-zeros wrong");
  Array<float> alone(size);
  unpack(packed, alone.data(), nullptr);
  if (!alone.same_bytes(weights)) fail("unpacks differently without a mask");
  return weights;
}

// Weights that are 4-bit integers times their group's scale, whatever its sign, and whether or not the lowest integer
// is among them: they come back as they are.
void check_on_grid(Random& random, std::int64_t rounds) {
  for (std::int64_t i = 0; i < rounds; ++i) {
    Matrix m = random_matrix(random);
    m.format = random.pick(std::array{Format::int4, Format::dense4});
    at_case("on the grid", i, m);
    for (std::uint32_t row = 0; row < m.rows; ++row) {
      for (std::uint32_t first = 0; first < m.columns; first += kGroupColumns) {
        const auto half = static_cast<std::uint16_t>(random.bits());
        const float scale = is_finite_half(half) ? half_to_float(half) : 1;
        const std::int64_t lowest = random.between(-8, 0), highest = random.between(0, 7);
        const double zeros = random.unit();
        for (std::uint32_t c = first; c < std::min(m.columns, first + kGroupColumns); ++c) {
          const bool zero = random.chance(zeros);
          m.at(row, c) = zero ? 0 : static_cast<float>(random.between(lowest, highest)) * scale;
        }
      }
    }
    const Array<float> weights = check_unpacked(m, parsed(packed(m)));
    for (std::size_t at = 0; at < weights.size(); ++at) {
      if (weights[at] != m.weights[at]) {
        fail("weight %zu: %.9g became %.9g", at, double{m.weights[at]}, double{weights[at]});
      }
    }
  }
  claim("%lld matrices of weights on the 4-bit grid: exactly the same", static_cast<long long>(rounds));
}

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

}  // namespace owl::selftest
