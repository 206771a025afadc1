// Where things are in a packed matrix: the arithmetic that packing, checking and the kernels share.
// All of it is static: the kernels are compiled once per instruction set, and must not share code across them.
#pragma once

#include <algorithm>

#include "format.h"

namespace owl {

inline constexpr std::uint32_t kBlockColumns = 32;  // of the packed formats: what 5 index bits can tell apart
inline constexpr std::uint32_t kMaskColumns = 64;   // of the 8-bit formats: one mask
inline constexpr std::uint32_t kInputBytes = 3;     // of an input of an 8-bit product
inline constexpr std::uint32_t kRowsTogether = 2;    // of the 8-bit formats: rows whose blocks alternate
inline constexpr std::uint32_t kOverread = 64;      // bytes after the last 8-bit weight that a load may touch

template <class T>
static constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
static constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

static inline bool is_packed(Format format) { return format == Format::packed32 || format == Format::packed16; }

static inline std::uint32_t block_columns(Format format) { return is_packed(format) ? kBlockColumns : kMaskColumns; }

static inline std::uint32_t padded_columns(const Header& header) {
  return round_up(header.columns, block_columns(header.format));
}

// Rows that slice `slice` holds. Of a paired matrix they are first its gate rows, then as many up rows.
static inline std::uint32_t rows_of(const Header& header, std::uint32_t slice) {
  if (header.paired) {
    const std::uint32_t half = header.slice_rows / 2;
    return 2 * std::min(half, header.rows / 2 - slice * half);
  }
  return std::min(header.slice_rows, header.rows - slice * header.slice_rows);
}

// The matrix row that is stored as row `i` of a slice.
static inline std::uint32_t matrix_row(const Header& header, std::uint32_t slice, std::uint32_t i) {
  if (header.paired) {
    const std::uint32_t count = rows_of(header, slice) / 2, first = slice * (header.slice_rows / 2);
    return i < count ? first + i : header.rows / 2 + first + (i - count);
  }
  return slice * header.slice_rows + i;
}

// Blocks of columns in panel `panel`.
static inline std::uint32_t blocks_of(const Header& header, std::uint32_t panel) {
  const std::uint32_t first = panel * header.panel_columns;
  return ceil_div(std::min(header.panel_columns, header.columns - first), block_columns(header.format));
}

// A unit of the packed formats: for each block a record of `groups` step counts and `groups * 16` positions, then
// `groups * 16` positions that restore the order of rows, then from the next multiple of 64 the words.
static inline std::uint32_t groups_of(std::uint32_t rows) { return ceil_div(rows, kLanes); }
static inline std::uint32_t record_bytes(std::uint32_t groups) { return groups * (1 + kLanes); }
static inline std::uint64_t words_offset(std::uint32_t groups, std::uint32_t blocks) {
  return round_up<std::uint64_t>(std::uint64_t{blocks} * record_bytes(groups) + groups * kLanes, kAlignment);
}
static inline std::uint32_t word_bytes(Format format) { return format == Format::packed32 ? 4 : 2; }

// A unit of the 8-bit formats: masks[pairs][blocks][2] if it has masks, then the weights in the order of those masks. A
// pair's second row may be one that is not there, and is then empty.
static inline std::uint32_t stored_rows(std::uint32_t rows) { return round_up(rows, kRowsTogether); }
static inline std::uint64_t values_offset(const Header& header, std::uint32_t rows) {
  if (header.format != Format::int8) return 0;
  return std::uint64_t{stored_rows(rows)} * blocks_of(header, 0) * sizeof(std::uint64_t);
}

}  // namespace owl
