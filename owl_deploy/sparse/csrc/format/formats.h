// The formats, each a struct that says what all others must know of it. A new one is such a struct in the list
// `Formats`, the functions of its units (units.h), and its kernels (kernels/kernel.h says which).
//
// All of it is static, as in layout.h.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>

#include "format/format.h"

namespace owl {

struct Units;

inline constexpr std::uint32_t kBlockColumns = 32;  // of words: what 5 index bits can tell apart
inline constexpr std::uint32_t kMaskColumns = 64;   // of 8-bit weights: one mask
inline constexpr std::uint32_t kGroupColumns = 64;  // of 4-bit weights: one scale

// Words of 16 or 32 bits that carry their columns, for 16 rows at a time.
struct WordFormat {
  static constexpr std::uint32_t kColumns = kBlockColumns;  // of a block
  static constexpr std::uint32_t kSliceRows = 256;          // that packing gives a slice, at most
  static constexpr bool kPanels = true;                     // columns may be divided
  static constexpr bool kSums = false;                      // a row's integers are summed up in the file
};

struct Packed32 : WordFormat {
  static constexpr Format kFormat = Format::packed32;
  static constexpr const char* kName = "packed32";
  static constexpr int kLevels = 0;  // the largest integer that stands for a weight; 0: none, and rows have no scales
  static const Units kUnits;

  using Word = std::uint32_t;
  static float value(Word word) { return std::bit_cast<float>(word); }
};

struct Packed16 : WordFormat {
  static constexpr Format kFormat = Format::packed16;
  static constexpr const char* kName = "packed16";
  static constexpr int kLevels = 1023;
  static const Units kUnits;

  using Word = std::uint16_t;
  static float value(Word word) { return static_cast<float>(static_cast<std::int16_t>(word) >> 5); }
};

// Bytes, row by row.
struct ByteFormat {
  static constexpr std::uint32_t kColumns = kMaskColumns;
  static constexpr std::uint32_t kSliceRows = 32;
  static constexpr bool kPanels = false;
  static constexpr bool kSums = true;
  static constexpr int kLevels = 127;
};

struct Int8 : ByteFormat {
  static constexpr Format kFormat = Format::int8;
  static constexpr const char* kName = "int8";
  static constexpr bool kMasked = true;
  static const Units kUnits;
};

struct Dense8 : ByteFormat {
  static constexpr Format kFormat = Format::dense8;
  static constexpr const char* kName = "dense8";
  static constexpr bool kMasked = false;
  static const Units kUnits;
};

// Nibbles, for bands of 16 rows: their columns come four at a time, and two bands share each byte.
struct NibbleFormat {
  static constexpr std::uint32_t kColumns = kGroupColumns;
  static constexpr std::uint32_t kSliceRows = 32;
  static constexpr bool kPanels = false;
  static constexpr bool kSums = false;
  static constexpr int kLevels = 0;  // scales are in the units: one for each row of a block
};

struct Int4 : NibbleFormat {
  static constexpr Format kFormat = Format::int4;
  static constexpr const char* kName = "int4";
  static constexpr bool kMasked = true;
  static const Units kUnits;
};

struct Dense4 : NibbleFormat {
  static constexpr Format kFormat = Format::dense4;
  static constexpr const char* kName = "dense4";
  static constexpr bool kMasked = false;
  static const Units kUnits;
};

template <class F>
concept OfWords = std::derived_from<F, WordFormat>;
template <class F>
concept OfBytes = std::derived_from<F, ByteFormat>;
template <class F>
concept OfNibbles = std::derived_from<F, NibbleFormat>;

template <class... F>
struct FormatList {
  static constexpr std::size_t count = sizeof...(F);
};

// By their numbers, from 1.
using Formats = FormatList<Packed32, Packed16, Int8, Dense8, Int4, Dense4>;

static constexpr bool is_format(int number) { return number >= 1 && number <= static_cast<int>(Formats::count); }

// What `visit` returns for the struct of this format.
template <class Visit, class First, class... Rest>
static constexpr decltype(auto) with_format(Format format, const Visit& visit, FormatList<First, Rest...>) {
  if constexpr (sizeof...(Rest) > 0) {
    if (format != First::kFormat) return with_format(format, visit, FormatList<Rest...>{});
  }
  return visit(First{});
}

template <class Visit>
static constexpr decltype(auto) with_format(Format format, const Visit& visit) {
  return with_format(format, visit, Formats{});
}

}  // namespace owl
