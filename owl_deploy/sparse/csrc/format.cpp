#include "format.h"

#include <bit>
#include <bitset>
#include <cmath>
#include <cstring>

#include "layout.h"

static_assert(std::endian::native == std::endian::little, "packed matrices are little-endian");

namespace owl {
namespace {

const char* check_header(const Header& h, std::size_t size) {
  if (h.magic != kMagic) return "not a packed matrix (wrong magic number)";
  if (h.version != kVersion) return "packed by another version of owl-deploy; export the model again";
  if (h.format < Format::packed32 || h.format > Format::dense8) return "unknown weight format";
  if (h.bytes != size) return "truncated, or longer than its header says";
  if (h.rows == 0 || h.columns == 0 || h.rows > kMaxSize || h.columns > kMaxSize) return "impossible shape";
  if (h.paired > 1 || (h.paired && h.rows % 2 != 0)) return "impossible pairing of rows";
  if (h.slice_rows == 0 || h.slice_rows > kMaxRows || h.slice_rows % kLanes != 0) return "impossible slices";
  const std::uint32_t halves = h.paired ? 2 : 1;
  if (h.slices != ceil_div(h.rows / halves, h.slice_rows / halves)) return "impossible slices";
  if (h.panel_columns == 0 || h.panel_columns % block_columns(h.format) != 0) return "impossible panels";
  if (h.panel_columns > padded_columns(h)) return "impossible panels";  // near 2^32, ceil_div would give 0 of them
  if (h.panels != ceil_div(h.columns, h.panel_columns)) return "impossible panels";
  if (!is_packed(h.format) && h.panels != 1) return "impossible panels";
  return nullptr;
}

// The bytes [offset, offset + length) lie after the header and before the end, at a multiple of 64.
bool lies_within(const Header& h, std::uint64_t offset, std::uint64_t length) {
  return offset % kAlignment == 0 && offset >= sizeof(Header) && offset <= h.bytes && length <= h.bytes - offset;
}

bool is_permutation_of(const std::uint8_t* positions, std::uint32_t count) {
  std::bitset<kMaxRows> seen;
  for (std::uint32_t i = 0; i < count; ++i) seen.set(positions[i]);
  for (std::uint32_t i = 0; i < count; ++i) {
    if (!seen[i]) return false;
  }
  return true;
}

template <class Word>
bool indices_below(const std::uint8_t* words, std::uint64_t count, std::uint32_t limit) {
  for (std::uint64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, words + i * sizeof(Word), sizeof(Word));
    if ((word & (kBlockColumns - 1)) >= limit) return false;
  }
  return true;
}

const char* check_packed_unit(const Header& h, const std::uint8_t* unit, std::uint64_t length, std::uint32_t slice,
                              std::uint32_t panel) {
  const std::uint32_t groups = groups_of(rows_of(h, slice)), blocks = blocks_of(h, panel);
  const std::uint64_t words = words_offset(groups, blocks), step_bytes = kLanes * word_bytes(h.format);
  if (words > length) return "a unit is too short";
  std::uint64_t steps = 0, last_steps = 0;
  for (std::uint32_t block = 0; block < blocks; ++block) {
    const std::uint8_t* record = unit + std::uint64_t{block} * record_bytes(groups);
    last_steps = 0;
    for (std::uint32_t group = 0; group < groups; ++group) {
      if (record[group] > kBlockColumns) return "a group has more steps than columns";
      last_steps += record[group];
    }
    steps += last_steps;
    if (!is_permutation_of(record + groups, groups * kLanes)) return "row positions are out of range";
  }
  if (!is_permutation_of(unit + std::uint64_t{blocks} * record_bytes(groups), groups * kLanes)) {
    return "row positions are out of range";
  }
  if (round_up<std::uint64_t>(words + steps * step_bytes, kAlignment) != length) return "a unit has a wrong length";
  // Five bits cannot leave a block, but the last block of a matrix may be narrower than that.
  const std::uint32_t ragged = h.columns % kBlockColumns;
  if (ragged != 0 && panel + 1 == h.panels) {
    const std::uint8_t* last = unit + words + (steps - last_steps) * step_bytes;
    const bool sound = h.format == Format::packed32
                           ? indices_below<std::uint32_t>(last, last_steps * kLanes, ragged)
                           : indices_below<std::uint16_t>(last, last_steps * kLanes, ragged);
    if (!sound) return "a column index is out of range";
  }
  return nullptr;
}

const char* check_int8_unit(const Header& h, const std::uint8_t* unit, std::uint64_t length, std::uint32_t slice) {
  const std::uint64_t rows = rows_of(h, slice), stored = stored_rows(rows_of(h, slice)), blocks = blocks_of(h, 0);
  std::uint64_t values = stored * blocks * kMaskColumns;
  const std::uint64_t mask_bytes = values_offset(h, rows_of(h, slice));
  if (h.format == Format::int8) {
    if (mask_bytes > length) return "a unit is too short";
    const std::uint32_t ragged = h.columns % kMaskColumns;
    const std::uint64_t beyond = ragged == 0 ? 0 : ~std::uint64_t{0} << ragged;
    values = 0;
    for (std::uint64_t i = 0; i < stored * blocks; ++i) {
      std::uint64_t mask;
      std::memcpy(&mask, unit + i * sizeof(mask), sizeof(mask));
      values += std::popcount(mask);
      const std::uint64_t row = i / (blocks * kRowsTogether) * kRowsTogether + i % kRowsTogether;
      if (row >= rows && mask != 0) return "a row is out of range";
      const bool last = i / kRowsTogether % blocks == blocks - 1;
      if (last && (mask & beyond) != 0) return "a column index is out of range";
    }
  }
  return round_up(mask_bytes + values, std::uint64_t{kAlignment}) == length ? nullptr : "a unit has a wrong length";
}

}  // namespace

const char* parse(const std::uint8_t* data, std::size_t size, Packed& packed) {
  if (reinterpret_cast<std::uintptr_t>(data) % kAlignment != 0) return "packed matrix is not aligned to 64 bytes";
  if (size < sizeof(Header)) return "truncated: shorter than a header";
  const Header& h = *reinterpret_cast<const Header*>(data);
  if (const char* problem = check_header(h, size)) return problem;

  const std::uint64_t count = std::uint64_t{h.slices} * h.panels;
  if (!lies_within(h, sizeof(Header), (count + 1) * sizeof(std::uint64_t))) return "truncated: no room for its units";
  const auto* units = reinterpret_cast<const std::uint64_t*>(data + sizeof(Header));
  const bool scaled = h.format != Format::packed32, summed = !is_packed(h.format);
  if (scaled && !lies_within(h, h.scales, std::uint64_t{h.rows} * sizeof(float))) return "its scales are out of range";
  if (summed && !lies_within(h, h.sums, std::uint64_t{h.rows} * sizeof(float))) return "its sums are out of range";
  packed = {data, &h, units, scaled ? reinterpret_cast<const float*>(data + h.scales) : nullptr,
            summed ? reinterpret_cast<const std::int32_t*>(data + h.sums) : nullptr};
  for (std::uint32_t row = 0; scaled && row < h.rows; ++row) {
    if (!std::isfinite(packed.scales[row])) return "a scale is not finite";
  }
  for (std::uint64_t i = 0; i < count; ++i) {
    if (units[i + 1] < units[i] || !lies_within(h, units[i], units[i + 1] - units[i])) {
      return "a unit is out of range";
    }
    const std::uint8_t* unit = data + units[i];
    const auto slice = static_cast<std::uint32_t>(i / h.panels), panel = static_cast<std::uint32_t>(i % h.panels);
    const std::uint64_t length = units[i + 1] - units[i];
    const char* problem = is_packed(h.format) ? check_packed_unit(h, unit, length, slice, panel)
                                              : check_int8_unit(h, unit, length, slice);
    if (problem != nullptr) return problem;
  }
  if (units[count] > h.bytes - kOverread) return "truncated: no room after its last unit";
  return nullptr;
}

}  // namespace owl
