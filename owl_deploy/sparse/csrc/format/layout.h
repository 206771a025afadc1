// Where things are in a packed matrix: the arithmetic that packing, checking and the kernels share.
// All of it is static: the kernels are compiled once per instruction set, and must not share code across them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "format/format.h"
#include "format/formats.h"

namespace owl {

inline constexpr std::uint32_t kRowsTogether = 2;  // of the 8-bit formats: rows whose blocks alternate
inline constexpr std::uint32_t kOverread = 64;     // bytes after the last weight that a load may touch

template <class T>
static constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
static constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

template <class F>
static inline std::uint32_t padded_columns(const Header& header) {
  return round_up(header.columns, F::kColumns);
}

// Rows of the product.
static inline std::int64_t outputs(const Header& header) { return header.paired ? header.rows / 2 : header.rows; }

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
template <class F>
static inline std::uint32_t blocks_of(const Header& header, std::uint32_t panel) {
  const std::uint32_t first = panel * header.panel_columns;
  return ceil_div(std::min(header.panel_columns, header.columns - first), F::kColumns);
}

static inline Unit unit_of(const Packed& packed, std::uint32_t slice, std::uint32_t panel) {
  const std::uint64_t* offsets = packed.units.data() + std::size_t{slice} * packed.header.panels + panel;
  return {packed.data + offsets[0], packed.data + offsets[1]};
}

// A unit of words: for each block a record of `groups` step counts and `groups * 16` positions, then `groups * 16`
// positions that restore the order of rows, then from the next multiple of 64 the words.
static inline std::uint32_t groups_of(std::uint32_t rows) { return ceil_div(rows, kLanes); }
static inline std::uint32_t record_bytes(std::uint32_t groups) { return groups * (1 + kLanes); }
static inline std::uint64_t words_offset(std::uint32_t groups, std::uint32_t blocks) {
  return round_up<std::uint64_t>(std::uint64_t{blocks} * record_bytes(groups) + groups * kLanes, kAlignment);
}

// Where the words of a group end that begins at `words`: its step count must not lead past the unit's end.
template <class Word>
static inline const Word* group_end(const Word* words, std::uint32_t steps, Unit unit) {
  const auto wanted = reinterpret_cast<std::uintptr_t>(words) + steps * kLanes * sizeof(Word);
  return reinterpret_cast<const Word*>(std::min(wanted, reinterpret_cast<std::uintptr_t>(unit.end)));
}

// A unit of bytes: masks[pairs][blocks][2] if it has masks, then the weights in the order of those masks. A pair's
// second row may be one that is not there, and is then empty.
static inline std::uint32_t stored_rows(std::uint32_t rows) { return round_up(rows, kRowsTogether); }
template <OfBytes F>
static inline std::uint64_t values_offset(std::uint32_t rows, std::uint32_t blocks) {
  return F::kMasked ? std::uint64_t{stored_rows(rows)} * blocks * sizeof(std::uint64_t) : 0;
}

// A unit of nibbles: pairs of bands, each band 16 rows. Of each block of each pair there is a record: scales as fp16,
// for one band's rows and then for the other's; in int4 two masks for each tile, which is four columns of the block;
// and the bytes that the bands' weights share, as many as the band with more weights has, up to a multiple of 8. In
// dense4 these are 64 for each tile.
inline constexpr std::uint32_t kBands = 2;
inline constexpr std::uint32_t kTileColumns = 4;
inline constexpr std::uint32_t kTiles = kGroupColumns / kTileColumns;  // of a block
inline constexpr std::uint32_t kTileBytes = kLanes * kTileColumns;
inline constexpr std::uint32_t kScaleBytes = kBands * kLanes * sizeof(std::uint16_t);
inline constexpr std::uint32_t kMaskBytes = kTiles * kBands * sizeof(std::uint64_t);
inline constexpr std::uint32_t kWeightBytes = kTiles * kTileBytes;  // of all of a block's weights
template <OfNibbles F>
inline constexpr std::uint32_t kMostRecordBytes = kScaleBytes + (F::kMasked ? kMaskBytes : 0) + kWeightBytes;

static inline std::uint32_t band_pairs(std::uint32_t rows) { return ceil_div(rows, kBands * kLanes); }

// Of a record with so many bytes of weights.
template <OfNibbles F>
static inline std::ptrdiff_t record_bytes_with(std::ptrdiff_t weight_bytes) {
  return kScaleBytes + (F::kMasked ? kMaskBytes : 0) + round_up<std::ptrdiff_t>(weight_bytes, sizeof(std::uint64_t));
}

// From here on a load of 64 bytes would leave the matrix: masks must not lead past it.
template <class Byte>
static inline const Byte* last_values(const Packed& packed) {
  return reinterpret_cast<const Byte*>(packed.data + packed.header.bytes - kOverread);
}

// `values` after `count` of them, or where no more can be.
template <class Byte>
static inline const Byte* advanced(const Byte* values, std::ptrdiff_t count, const Byte* last) {
  return values + std::min(count, last - values);
}

// The records of nibbles, one after the other. Masks may have been rewritten since they were checked: where they could
// lead out of the matrix, what is left of it is copied to where they cannot.
namespace {

template <OfNibbles F>
class RecordReader {
 public:
  RecordReader(const Packed& packed, Unit unit) : at_(unit.begin), last_(last_values<std::uint8_t>(packed)) {}

  // The next record, of which all bytes that it could have may be read, and 64 more.
  const std::uint8_t* next() {
    if (last_ - at_ >= kMostRecordBytes<F>) [[likely]] return at_;
    const auto left = static_cast<std::size_t>(last_ - at_) + kOverread;
    std::memcpy(copy_, at_, left);
    std::memset(copy_ + left, 0, sizeof(copy_) - left);
    return copy_;
  }
  // It had so many bytes of weights.
  void used(std::ptrdiff_t weight_bytes) { at_ = advanced(at_, record_bytes_with<F>(weight_bytes), last_); }

 private:
  const std::uint8_t *at_, *last_;
  alignas(std::uint64_t) std::uint8_t copy_[kMostRecordBytes<F> + kOverread];
};

}  // namespace

}  // namespace owl
