// Damaged matrices: refused, or harmless; and matrices that are rewritten after they were checked.
#include <algorithm>
#include <cstddef>

#include "selftest/harness.h"

namespace owl::selftest {
namespace {

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
  const Header& h = packed.header;
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

}  // namespace

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
      const Header& h = parsed(array).header;
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

// Bytes that change after they were checked, as those of a mapped file may: any numbers, and no access out of bounds.
void check_rewritten(Random& random, std::int64_t rounds) {
  static constexpr std::array<std::pair<std::uint32_t, std::uint32_t>, 6> kShapes = {
      {{2, 3}, {18, 70}, {40, 64}, {258, 20}, {34, 290}, {70, 2200}}};
  std::int64_t rewritten = 0;
  for (const Format format : kFormats) {
    for (const auto& [rows, columns] : kShapes) {
      for (std::int64_t i = 0; i < std::max<std::int64_t>(1, rounds / 4); ++i) {
        const Matrix m{rows, columns, format, random.chance(0.5), random_weights(random, rows, columns)};
        at_case("rewritten", i, m);
        const Array<std::uint8_t> bytes = selftest::packed(m);
        const Packed weights = parsed(bytes);
        const bool any = random.chance(0.5);
        const std::uint8_t all = random.pick(kBytes);
        const std::size_t first = random.chance(0.5) ? 0 : random.below(bytes.size());
        for (std::size_t at = first; at < bytes.size(); ++at) {
          bytes[at] = any ? static_cast<std::uint8_t>(random.bits()) : all;
        }
        for (const std::int64_t tokens : {std::int64_t{1}, random.between(2, 7), random.between(48, 70)}) {
          const Array<float> x = random_inputs(random, tokens, columns);
          for (const Kernels* kernels : all_kernels()) multiply(*kernels, weights, x, tokens);
        }
        const Array<float> unpacked(m.weights.size());
        const Array<std::uint8_t> mask(m.weights.size());
        unpack(weights, unpacked.data(), mask.data());
        ++rewritten;
      }
    }
  }
  claim("%lld matrices rewritten after they were checked: harmless", static_cast<long long>(rewritten));
}

}  // namespace owl::selftest
