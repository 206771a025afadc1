// What a weight becomes, and what can be packed.
#include <algorithm>
#include <cfloat>

#include "selftest/harness.h"

namespace owl::selftest {
namespace {

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

}  // namespace

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
  if (packed.header.nonzeros != nonzeros) fail("its header counts non-zeros wrong");
  Array<float> alone(size);
  unpack(packed, alone.data(), nullptr);
  if (!alone.same_bytes(weights)) fail("unpacks differently without a mask");
  return weights;
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
