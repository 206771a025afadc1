// Units of int4 and dense4.
#include <array>
#include <bit>
#include <cstring>
#include <vector>

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
const char* check(const Header& h, Unit unit, std::uint32_t slice, std::uint32_t /*panel*/) {
  const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of<F>(h, 0);
  const auto length = static_cast<std::uint64_t>(unit.end - unit.begin);
  if (records_bytes<F>(rows, blocks) > length) return "a unit is too short";
  std::uint64_t bytes = records_bytes<F>(rows, blocks);
  const std::uint8_t* record = unit.begin;
  for (std::uint32_t pair = 0; pair < band_pairs(rows); ++pair) {
    std::array<std::uint64_t, kBands> counts{};
    for (std::uint32_t block = 0; block < blocks; ++block, record += kRecordBytes<F>) {
      for (std::uint32_t i = 0; i < kRows; ++i) {
        if (!is_finite_half(read_half(record + i * sizeof(std::uint16_t)))) return "a scale is not finite";
      }
      for (std::uint32_t i = 0; F::kMasked && i < kTiles * kBands; ++i) {
        const std::uint32_t tile = i / kBands, band = i % kBands;
        const std::uint64_t mask = read_mask(record, tile, band);
        if ((mask & beyond(h, rows_of_band(rows, pair, band), block, tile)) != 0) {
          return "a row or a column index is out of range";
        }
        counts[band] += static_cast<std::uint64_t>(std::popcount(mask));
      }
    }
    bytes += std::max(counts[0], counts[1]);
  }
  return round_up(bytes, std::uint64_t{kAlignment}) == length ? nullptr : "a unit has a wrong length";
}

template <OfNibbles F>
std::uint64_t most_bytes(const Header& h, std::uint32_t slice, std::uint32_t /*panel*/) {
  const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of<F>(h, 0);
  const std::uint64_t values = F::kMasked ? std::uint64_t{band_pairs(rows)} * blocks * kTiles * kTileBytes : 0;
  return round_up<std::uint64_t>(records_bytes<F>(rows, blocks) + values, kAlignment);
}

// A block of a band: weights of 16 rows, 0 where there are none, and their scales.
struct Block {
  std::array<std::array<float, kGroupColumns>, kLanes> weights{};
  std::array<float, kLanes> scales{};

  // Reads the weights, and writes the scales as they are stored to `to`.
  Block(const Slice& slice, const Header& h, std::uint32_t first_row, std::uint32_t block, std::uint8_t* to) {
    const std::uint32_t first = block * kGroupColumns;
    for (std::uint32_t row = 0; row < kLanes; ++row, to += sizeof(std::uint16_t)) {
      std::uint16_t scale = 0;
      if (first_row + row < slice.rows()) {
        std::copy_n(slice.row(first_row + row) + first, std::min(kGroupColumns, h.columns - first),
                    weights[row].data());
        scale = scale_of_group(weights[row].data());
      }
      std::memcpy(to, &scale, sizeof(scale));
      scales[row] = half_to_float(scale);
    }
  }

  float weight(std::uint32_t tile, std::uint32_t i) const {
    return weights[i / kTileColumns][tile * kTileColumns + i % kTileColumns];
  }
  // The nibble of weight `i` of a tile.
  std::uint8_t nibble(std::uint32_t tile, std::uint32_t i) const {
    return static_cast<std::uint8_t>(quantised4(weight(tile, i), scales[i / kTileColumns])) & 15;
  }
};

template <OfNibbles F>
std::uint8_t* pack(const Slice& slice, const Header& h, std::uint32_t /*panel*/, const float*, std::int32_t*,
                   std::uint8_t* unit) {
  const std::uint32_t blocks = blocks_of<F>(h, 0);
  std::uint8_t* record = unit;
  std::uint8_t* values = unit + records_bytes<F>(slice.rows(), blocks);
  for (std::uint32_t pair = 0; pair < band_pairs(slice.rows()); ++pair) {
    std::array<std::vector<std::uint8_t>, kBands> nibbles;  // of int4, those that are stored
    for (std::uint32_t block = 0; block < blocks; ++block, record += kRecordBytes<F>) {
      if constexpr (!F::kMasked) std::memset(record + kScaleBytes, 0, kTiles * kTileBytes);
      for (std::uint32_t band = 0; band < kBands; ++band) {
        std::uint8_t* const scales = record + band * kLanes * sizeof(std::uint16_t);
        const Block of_band(slice, h, (pair * kBands + band) * kLanes, block, scales);
        for (std::uint32_t tile = 0; tile < kTiles; ++tile) {
          std::uint64_t mask = 0;
          for (std::uint32_t i = 0; i < kTileBytes; ++i) {
            if (!F::kMasked) {
              const auto nibble = static_cast<std::uint8_t>(of_band.nibble(tile, i) << 4 * band);
              record[kScaleBytes + tile * kTileBytes + i] |= nibble;
            } else if (of_band.weight(tile, i) != 0) {
              mask |= std::uint64_t{1} << i;
              nibbles[band].push_back(of_band.nibble(tile, i));
            }
          }
          if (F::kMasked) {
            std::memcpy(record + kScaleBytes + (tile * kBands + band) * sizeof(mask), &mask, sizeof(mask));
          }
        }
      }
    }
    const auto& [low, high] = nibbles;
    for (std::size_t i = 0; i < std::max(low.size(), high.size()); ++i) {
      const int lower = i < low.size() ? low[i] : 0, upper = i < high.size() ? high[i] : 0;
      *values++ = static_cast<std::uint8_t>(lower | upper << 4);
    }
  }
  return filled_up(unit, values);
}

// -8 to 7
int integer_of(std::uint8_t byte, std::uint32_t band) { return static_cast<std::int8_t>(byte << 4 * (1 - band)) >> 4; }

template <OfNibbles F>
void unpack(const Packed& packed, std::uint32_t slice, std::uint32_t /*panel*/, float* weights, std::uint8_t* mask) {
  const Header& h = packed.header;
  const Unit unit = unit_of(packed, slice, 0);
  const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of<F>(h, 0);
  const std::uint8_t *record = unit.begin, *values = unit.begin + records_bytes<F>(rows, blocks);
  const auto* const last = last_values<std::uint8_t>(packed);
  for (std::uint32_t pair = 0; pair < band_pairs(rows); ++pair) {
    std::array<const std::uint8_t*, kBands> next{values, values};
    for (std::uint32_t block = 0; block < blocks; ++block, record += kRecordBytes<F>) {
      for (std::uint32_t i = 0; i < kTiles * kBands; ++i) {
        const std::uint32_t tile = i / kBands, band = i % kBands, first_row = (pair * kBands + band) * kLanes;
        const std::uint64_t stored = F::kMasked ? read_mask(record, tile, band) : ~std::uint64_t{0};
        const std::uint8_t* from = F::kMasked ? next[band] : record + kScaleBytes + tile * kTileBytes;
        if (F::kMasked) next[band] = advanced(next[band], std::popcount(stored), last);
        const std::uint64_t outside = beyond(h, rows_of_band(rows, pair, band), block, tile);
        for (std::uint64_t bits = stored; bits != 0; bits &= bits - 1, ++from) {
          const auto at = static_cast<std::uint32_t>(std::countr_zero(bits));
          if ((outside >> at & 1) != 0) continue;
          const std::uint32_t row = at / kTileColumns, column = tile * kTileColumns + at % kTileColumns;
          const float scale = half_to_float(read_half(record + (band * kLanes + row) * sizeof(std::uint16_t)));
          const std::uint64_t to =
              std::uint64_t{matrix_row(h, slice, first_row + row)} * h.columns + block * kGroupColumns + column;
          weights[to] = static_cast<float>(integer_of(*from, band)) * scale;
          if (mask != nullptr) mask[to] = 1;
        }
      }
    }
    values = std::max(next[0], next[1]);
  }
}

template <OfNibbles F>
constexpr Units kNibbleUnits = {check<F>, most_bytes<F>, pack<F>, unpack<F>};

}  // namespace

constexpr Units Int4::kUnits = kNibbleUnits<Int4>;
constexpr Units Dense4::kUnits = kNibbleUnits<Dense4>;

}  // namespace owl
