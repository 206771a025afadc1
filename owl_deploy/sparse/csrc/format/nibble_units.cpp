// Units of int4 and dense4.
#include <array>
#include <bit>
#include <cstring>

#include "format/grid4.h"
#include "format/half.h"
#include "format/units.h"

namespace owl {
namespace {

constexpr std::uint32_t kRows = kBands * kLanes;  // of a pair of bands

std::uint16_t read_half(const std::uint8_t* from) {
  std::uint16_t half;
  std::memcpy(&half, from, sizeof(half));
  return half;
}

// The mask of a band's tile in a record of int4.
std::uint64_t read_mask(const std::uint8_t* record, std::uint32_t tile, std::uint32_t band) {
  std::uint64_t mask;
  std::memcpy(&mask, record + kScaleBytes + (tile * kBands + band) * sizeof(mask), sizeof(mask));
  return mask;
}

// Bytes of weights in a record: as many as the band with more of them has.
template <OfNibbles F>
std::uint32_t weight_bytes(const std::uint8_t* record) {
  if (!F::kMasked) return kWeightBytes;
  std::array<std::uint32_t, kBands> counts{};
  for (std::uint32_t i = 0; i < kTiles * kBands; ++i) {
    counts[i % kBands] += static_cast<std::uint32_t>(std::popcount(read_mask(record, i / kBands, i % kBands)));
  }
  return std::max(counts[0], counts[1]);
}

// The bits of tile `tile` of block `block` that lie beyond the matrix, in a band of which `rows` are there.
std::uint64_t beyond(const Header& h, std::uint32_t rows, std::uint32_t block, std::uint32_t tile) {
  const std::uint32_t first = block * kGroupColumns + tile * kTileColumns;
  const std::uint32_t columns = first >= h.columns ? 0 : std::min(kTileColumns, h.columns - first);
  const std::uint64_t of_row = (1U << kTileColumns) - (1U << columns);
  const std::uint64_t of_rows = of_row * 0x1111111111111111;
  return rows >= kLanes ? of_rows : of_rows | ~std::uint64_t{0} << rows * kTileColumns;
}

std::uint32_t rows_of_band(std::uint32_t rows, std::uint32_t pair, std::uint32_t band) {
  const std::uint32_t first = (pair * kBands + band) * kLanes;
  return first >= rows ? 0 : std::min(kLanes, rows - first);
}

template <OfNibbles F>
const char* check_record(const Header& h, const std::uint8_t* record, std::uint32_t rows, std::uint32_t pair,
                         std::uint32_t block) {
  for (std::uint32_t i = 0; i < kRows; ++i) {
    if (!is_finite_half(read_half(record + i * sizeof(std::uint16_t)))) return "a scale is not finite";
  }
  for (std::uint32_t i = 0; F::kMasked && i < kTiles * kBands; ++i) {
    const std::uint32_t tile = i / kBands, band = i % kBands;
    const std::uint64_t outside = beyond(h, rows_of_band(rows, pair, band), block, tile);
    if ((read_mask(record, tile, band) & outside) != 0) return "a row or a column index is out of range";
  }
  return nullptr;
}

template <OfNibbles F>
const char* check(const Header& h, Unit unit, std::uint32_t slice, std::uint32_t /*panel*/) {
  const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of<F>(h, 0);
  const std::uint8_t* record = unit.begin;
  for (std::uint32_t pair = 0; pair < band_pairs(rows); ++pair) {
    for (std::uint32_t block = 0; block < blocks; ++block) {
      if (unit.end - record < record_bytes_with<F>(0)) return "a unit is too short";
      if (const char* problem = check_record<F>(h, record, rows, pair, block)) return problem;
      const std::ptrdiff_t length = record_bytes_with<F>(weight_bytes<F>(record));
      if (unit.end - record < length) return "a unit is too short";
      record += length;
    }
  }
  const auto used = static_cast<std::uint64_t>(record - unit.begin);
  const bool fits = round_up(used, std::uint64_t{kAlignment}) == static_cast<std::uint64_t>(unit.end - unit.begin);
  return fits ? nullptr : "a unit has a wrong length";
}

template <OfNibbles F>
std::uint64_t most_bytes(const Header& h, std::uint32_t slice, std::uint32_t /*panel*/) {
  return std::uint64_t{band_pairs(rows_of(h, slice))} * blocks_of<F>(h, 0) * kMostRecordBytes<F>;
}

// A block of a band: weights of 16 rows, 0 where there are none, and their scales.
struct Block {
  std::array<std::array<float, kGroupColumns>, kLanes> weights{};
  std::array<std::array<std::uint8_t, kGroupColumns>, kLanes> nibbles{};

  // Reads the weights, and writes their scales to `scales`.
  Block(const Slice& slice, const Header& h, std::uint32_t first_row, std::uint32_t block, std::uint8_t* scales) {
    const std::uint32_t first = block * kGroupColumns;
    for (std::uint32_t row = 0; row < kLanes; ++row, scales += sizeof(std::uint16_t)) {
      std::uint16_t scale = 0;
      if (first_row + row < slice.rows()) {
        std::copy_n(slice.row(first_row + row) + first, std::min(kGroupColumns, h.columns - first),
                    weights[row].data());
        scale = scale_of_group(weights[row].data());
      }
      std::memcpy(scales, &scale, sizeof(scale));
      for (std::uint32_t c = 0; c < kGroupColumns; ++c) {
        nibbles[row][c] = static_cast<std::uint8_t>(quantised4(weights[row][c], half_to_float(scale))) & 15;
      }
    }
  }
};

// A band's weights of a block, into the lower or the upper half of bytes: all of them, or with their masks. Returns how
// many bytes these are.
template <OfNibbles F>
std::uint32_t pack_band(const Block& block, std::uint32_t band, std::uint8_t* tiles) {
  std::uint8_t* const weights = F::kMasked ? tiles + kMaskBytes : tiles;
  std::uint32_t count = 0;
  for (std::uint32_t tile = 0; tile < kTiles; ++tile) {
    std::uint64_t mask = 0;
    for (std::uint32_t i = 0; i < kTileBytes; ++i) {
      const std::uint32_t row = i / kTileColumns, column = tile * kTileColumns + i % kTileColumns;
      const bool stored = !F::kMasked || block.weights[row][column] != 0;
      mask |= std::uint64_t{stored} << i;
      if (stored) weights[count] |= static_cast<std::uint8_t>(block.nibbles[row][column] << 4 * band);
      count += stored;
    }
    if (F::kMasked) std::memcpy(tiles + (tile * kBands + band) * sizeof(mask), &mask, sizeof(mask));
  }
  return count;
}

template <OfNibbles F>
std::uint8_t* pack(const Slice& slice, const Header& h, std::uint32_t /*panel*/, const float*, std::int32_t*,
                   std::uint8_t* unit) {
  std::uint8_t* record = unit;
  for (std::uint32_t pair = 0; pair < band_pairs(slice.rows()); ++pair) {
    for (std::uint32_t block = 0; block < blocks_of<F>(h, 0); ++block) {
      std::memset(record, 0, kMostRecordBytes<F>);
      std::uint32_t count = 0;
      for (std::uint32_t band = 0; band < kBands; ++band) {
        const std::uint32_t first_row = (pair * kBands + band) * kLanes;
        const Block weights(slice, h, first_row, block, record + band * kLanes * sizeof(std::uint16_t));
        count = std::max(count, pack_band<F>(weights, band, record + kScaleBytes));
      }
      record += record_bytes_with<F>(count);
    }
  }
  return filled_up(unit, record);
}

// -8 to 7
int integer_of(std::uint8_t byte, std::uint32_t band) { return static_cast<std::int8_t>(byte << 4 * (1 - band)) >> 4; }

// A band's weights of a block that lie in the matrix: calls found(row of the band, column of the block, weight).
template <OfNibbles F, class Found>
void unpack_band(const Header& h, const std::uint8_t* record, std::uint32_t band, std::uint32_t rows,
                 std::uint32_t block, const Found& found) {
  const std::uint8_t* next = record + record_bytes_with<F>(0);
  for (std::uint32_t tile = 0; tile < kTiles; ++tile) {
    const std::uint64_t outside = beyond(h, rows, block, tile);
    std::uint64_t bits = F::kMasked ? read_mask(record, tile, band) : ~std::uint64_t{0};
    for (; bits != 0; bits &= bits - 1, ++next) {
      const auto at = static_cast<std::uint32_t>(std::countr_zero(bits));
      if ((outside >> at & 1) != 0) continue;
      const std::uint32_t row = at / kTileColumns;
      const float scale = half_to_float(read_half(record + (band * kLanes + row) * sizeof(std::uint16_t)));
      found(row, tile * kTileColumns + at % kTileColumns, static_cast<float>(integer_of(*next, band)) * scale);
    }
  }
}

template <OfNibbles F>
void unpack(const Packed& packed, std::uint32_t slice, std::uint32_t /*panel*/, float* weights, std::uint8_t* mask) {
  const Header& h = packed.header;
  const std::uint32_t rows = rows_of(h, slice);
  RecordReader<F> records(packed, unit_of(packed, slice, 0));
  for (std::uint32_t pair = 0; pair < band_pairs(rows); ++pair) {
    for (std::uint32_t block = 0; block < blocks_of<F>(h, 0); ++block) {
      const std::uint8_t* const record = records.next();
      for (std::uint32_t band = 0; band < kBands; ++band) {
        const std::uint32_t first_row = (pair * kBands + band) * kLanes;
        unpack_band<F>(h, record, band, rows_of_band(rows, pair, band), block,
                       [&](std::uint32_t row, std::uint32_t column, float weight) {
                         const std::uint64_t at = std::uint64_t{matrix_row(h, slice, first_row + row)} * h.columns +
                                                  block * kGroupColumns + column;
                         weights[at] = weight;
                         if (mask != nullptr) mask[at] = 1;
                       });
      }
      records.used(weight_bytes<F>(record));
    }
  }
}

template <OfNibbles F>
constexpr Units kNibbleUnits = {check<F>, most_bytes<F>, pack<F>, unpack<F>};

}  // namespace

constexpr Units Int4::kUnits = kNibbleUnits<Int4>;
constexpr Units Dense4::kUnits = kNibbleUnits<Dense4>;

}  // namespace owl
