// What a format does with its units: the bytes of one slice of rows in one panel of columns.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "format/format.h"
#include "format/layout.h"

namespace owl {

// Rows of dense weights that become one slice.
class Slice {
 public:
  Slice(const float* weights, const Header& h, std::uint32_t slice) : count_(rows_of(h, slice)) {
    for (std::uint32_t i = 0; i < count_; ++i) {
      rows_[i] = weights + std::uint64_t{matrix_row(h, slice, i)} * h.columns;
    }
  }

  std::uint32_t rows() const { return count_; }
  const float* row(std::uint32_t i) const { return rows_[i]; }

 private:
  std::uint32_t count_;
  std::array<const float*, kMaxRows> rows_{};
};

struct Units {
  // Null, or what is wrong with a unit of these bytes.
  const char* (*check)(const Header& h, Unit unit, std::uint32_t slice, std::uint32_t panel);

  // Bytes of a unit without a single zero. One more may be written, past the last weight of 8 bits.
  std::uint64_t (*most_bytes)(const Header& h, std::uint32_t slice, std::uint32_t panel);

  // Writes the unit, with the zeros that fill it up, and the sums of its rows where the format has them. Returns its
  // end. `scales` and `sums` are the slice's, or null.
  std::uint8_t* (*pack)(const Slice& slice, const Header& h, std::uint32_t panel, const float* scales,
                        std::int32_t* sums, std::uint8_t* unit);

  // Writes its weights that are not zero, and their mask if that is not null, into matrices that are 0 elsewhere.
  void (*unpack)(const Packed& packed, std::uint32_t slice, std::uint32_t panel, float* weights, std::uint8_t* mask);
};

static inline const Units& units_of(Format format) {
  return with_format(format, [](auto f) -> const Units& { return f.kUnits; });
}

// ---- What packing them shares ----

// To the nearest integer, ties to even. What a sum with 1.5 * 2^23 loses is the fraction; compilers vectorise it.
static inline int quantised(float weight, float scale, int levels) {
  constexpr float kWholeNumbers = 0x1.8p23f;
  const float rounded = (weight / scale + kWholeNumbers) - kWholeNumbers;
  return std::clamp(static_cast<int>(rounded), -levels, levels);
}

// Which of some values, a multiple of 8 and at most 64, are not zero, as bits.
template <std::size_t kCount>
static std::uint64_t mask_of(const float* values) {
  std::array<std::uint8_t, kCount> is{};
  for (std::size_t c = 0; c < kCount; ++c) is[c] = values[c] != 0;
  std::uint64_t bits = 0;
  for (std::size_t c = 0; c < kCount; c += 8) {
    std::uint64_t bytes;  // each 0 or 1; the product brings their sum of powers of two into the highest one
    std::memcpy(&bytes, is.data() + c, sizeof(bytes));
    bits |= (bytes * 0x0102040810204080 >> 56) << c;
  }
  return bits;
}

// Zeros up to the next multiple of 64 bytes, counted from `unit`; where they end.
static inline std::uint8_t* filled_up(const std::uint8_t* unit, std::uint8_t* end) {
  const auto length = static_cast<std::uint64_t>(end - unit);
  return std::fill_n(end, round_up<std::uint64_t>(length, kAlignment) - length, std::uint8_t{0});
}

}  // namespace owl
