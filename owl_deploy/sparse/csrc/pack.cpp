#include "pack.h"

#include <array>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "layout.h"

namespace owl {
namespace {

constexpr std::uint32_t kPackedSliceRows = 256, kInt8SliceRows = 32;
constexpr std::uint32_t kUnits = 32;            // wanted of a matrix, so that many threads find work
constexpr std::uint32_t kPanelBlocks = 4;       // a panel is no narrower
constexpr int kLevels16 = 1023, kLevels8 = 127;  // largest magnitudes

Header make_header(std::uint32_t rows, std::uint32_t columns, Format format, bool paired) {
  Header h{};
  h.magic = kMagic;
  h.version = kVersion;
  h.format = format;
  h.paired = paired ? 1 : 0;
  h.rows = rows;
  h.columns = columns;
  const std::uint32_t most = is_packed(format) ? kPackedSliceRows : kInt8SliceRows;
  const std::uint32_t slices = ceil_div(rows, most);  // of equal size, as far as groups of rows allow
  h.slice_rows = round_up(ceil_div(rows, slices), 2 * kLanes);
  const std::uint32_t halves = paired ? 2 : 1;
  h.slices = ceil_div(rows / halves, h.slice_rows / halves);
  const std::uint32_t blocks = ceil_div(columns, block_columns(format));
  std::uint32_t panels = 1;
  if (is_packed(format)) panels = std::clamp(ceil_div(kUnits, h.slices), 1U, std::max(1U, blocks / kPanelBlocks));
  h.panel_columns = ceil_div(blocks, panels) * block_columns(format);
  h.panels = ceil_div(columns, h.panel_columns);
  return h;
}

// The nearest fp32 number whose low 5 bits are `index`: never zero, never infinite.
std::uint32_t word32(float weight, std::uint32_t index) {
  constexpr std::uint32_t kIndexBits = kBlockColumns - 1, kInfinity = 0x7F800000;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(weight), sign = bits & 0x80000000;
  const std::uint32_t magnitude = bits & 0x7FFFFFFF;
  std::int64_t nearest = (magnitude & ~kIndexBits) | index;
  const std::int64_t error = nearest - magnitude;
  if (error > kBlockColumns / 2) nearest -= kBlockColumns;
  if (error < -static_cast<std::int64_t>(kBlockColumns / 2)) nearest += kBlockColumns;
  if (nearest <= 0) nearest += kBlockColumns;
  if (nearest >= kInfinity) nearest -= kBlockColumns;
  return sign | static_cast<std::uint32_t>(nearest);
}

int quantised(float weight, float scale, int levels) {
  return std::clamp(static_cast<int>(std::nearbyint(weight / scale)), -levels, levels);
}

// A stored weight is never 0, so that a word of 0 is padding and nothing else.
std::uint16_t word16(float weight, float scale, std::uint32_t index) {
  int q = quantised(weight, scale, kLevels16);
  if (q == 0) q = weight < 0 ? -1 : 1;
  return static_cast<std::uint16_t>(q * static_cast<int>(kBlockColumns) + static_cast<int>(index));
}

float row_scale(const float* row, std::uint64_t columns, int levels) {
  float largest = 0;
  for (std::uint64_t c = 0; c < columns; ++c) largest = std::max(largest, std::fabs(row[c]));
  largest = std::min(largest, 0x1.fffffp127f);  // so that `levels` times the scale, rounded, is a number
  return largest == 0 ? 0 : std::max(largest / static_cast<float>(levels), FLT_MIN);
}

// The rows of one slice, and how one of its blocks is arranged: rows by falling number of non-zeros, 16 to a group.
class Slice {
 public:
  Slice(const float* weights, const Header& h, std::uint32_t slice) : columns_(h.columns), count_(rows_of(h, slice)) {
    for (std::uint32_t i = 0; i < count_; ++i) {
      rows_[i] = weights + std::uint64_t{matrix_row(h, slice, i)} * h.columns;
    }
  }

  std::uint32_t groups() const { return groups_of(count_); }
  std::uint32_t rows() const { return count_; }
  const float* row(std::uint32_t i) const { return rows_[i]; }
  std::uint32_t width(std::uint32_t block) const {
    return std::min<std::uint32_t>(kBlockColumns, columns_ - block * kBlockColumns);
  }

  // Which columns of the block a row has, as bits; 0 for the rows that fill up the last group.
  std::uint32_t mask(std::uint32_t i, std::uint32_t block) const {
    if (i >= count_) return 0;
    const float* values = rows_[i] + std::uint64_t{block} * kBlockColumns;
    const std::uint32_t width = this->width(block);
    std::uint32_t bits = 0;
    for (std::uint32_t c = 0; c < width; ++c) bits |= std::uint32_t{values[c] != 0} << c;
    return bits;
  }

  // Arrange a block: fills order() and masks(), and returns the steps of all its groups.
  std::uint32_t arrange(std::uint32_t block) {
    const std::uint32_t padded = groups() * kLanes;
    std::array<std::uint32_t, kBlockColumns + 2> start{};
    for (std::uint32_t i = 0; i < padded; ++i) {
      masks_[i] = mask(i, block);
      ++start[kBlockColumns - std::popcount(masks_[i]) + 1];
    }
    for (std::uint32_t n = 1; n < start.size(); ++n) start[n] += start[n - 1];
    for (std::uint32_t i = 0; i < padded; ++i) {
      order_[start[kBlockColumns - std::popcount(masks_[i])]++] = static_cast<std::uint8_t>(i);
    }
    std::uint32_t steps = 0;
    for (std::uint32_t group = 0; group < groups(); ++group) steps += this->steps(group);
    return steps;
  }

  std::uint32_t steps(std::uint32_t group) const { return std::popcount(masks_[order_[group * kLanes]]); }
  std::uint32_t masked(std::uint32_t i) const { return masks_[i]; }
  const std::array<std::uint8_t, kMaxRows>& order() const { return order_; }

 private:
  std::uint32_t columns_, count_;
  std::array<const float*, kMaxRows> rows_{};
  std::array<std::uint32_t, kMaxRows> masks_{};
  std::array<std::uint8_t, kMaxRows> order_{};
};

// Bytes of a unit of the packed formats whose groups take so many steps together.
std::uint64_t unit_bytes(const Header& h, std::uint32_t groups, std::uint32_t blocks, std::uint64_t steps) {
  return round_up<std::uint64_t>(words_offset(groups, blocks) + steps * kLanes * word_bytes(h.format), kAlignment);
}

std::uint64_t packed_unit_bytes(Slice& slice, const Header& h, std::uint32_t panel) {
  const std::uint32_t blocks = blocks_of(h, panel), first = panel * h.panel_columns / kBlockColumns;
  std::uint64_t steps = 0;
  for (std::uint32_t block = 0; block < blocks; ++block) steps += slice.arrange(first + block);
  return unit_bytes(h, slice.groups(), blocks, steps);
}

std::uint64_t int8_unit_bytes(const Slice& slice, const Header& h) {
  const std::uint64_t masks = std::uint64_t{stored_rows(slice.rows())} * blocks_of(h, 0);
  if (h.format == Format::dense8) return masks * kMaskColumns;
  std::uint64_t values = 0;
  for (std::uint32_t i = 0; i < slice.rows(); ++i) {
    for (std::uint32_t c = 0; c < h.columns; ++c) values += slice.row(i)[c] != 0;
  }
  return round_up<std::uint64_t>(masks * sizeof(std::uint64_t) + values, kAlignment);
}

template <class Word>
void write_packed_unit(Slice& slice, const Header& h, std::uint32_t panel, const float* scales, std::uint8_t* unit) {
  const std::uint32_t groups = slice.groups(), blocks = blocks_of(h, panel);
  const std::uint32_t first = panel * h.panel_columns / kBlockColumns;
  auto* words = reinterpret_cast<Word*>(unit + words_offset(groups, blocks));
  std::array<std::uint8_t, kMaxRows> place{};  // where each row was put in the block before
  for (std::uint32_t i = 0; i < kMaxRows; ++i) place[i] = static_cast<std::uint8_t>(i);
  for (std::uint32_t block = 0; block < blocks; ++block) {
    slice.arrange(first + block);
    std::uint8_t* record = unit + std::uint64_t{block} * record_bytes(groups);
    for (std::uint32_t group = 0; group < groups; ++group) {
      const std::uint32_t steps = slice.steps(group);
      record[group] = static_cast<std::uint8_t>(steps);
      for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
        const std::uint32_t i = slice.order()[group * kLanes + lane];
        record[groups + group * kLanes + lane] = place[i];
        std::uint32_t step = 0;
        for (std::uint32_t bits = slice.masked(i); bits != 0; bits &= bits - 1, ++step) {
          const auto column = static_cast<std::uint32_t>(std::countr_zero(bits));
          const float weight = slice.row(i)[(first + block) * kBlockColumns + column];
          if constexpr (sizeof(Word) == 4) {
            words[step * kLanes + lane] = word32(weight, column);
          } else {
            words[step * kLanes + lane] = word16(weight, scales[i], column);
          }
        }
      }
      words += steps * kLanes;
    }
    for (std::uint32_t i = 0; i < groups * kLanes; ++i) place[slice.order()[i]] = static_cast<std::uint8_t>(i);
  }
  std::memcpy(unit + std::uint64_t{blocks} * record_bytes(groups), place.data(), groups * kLanes);
}

// The columns of block `block`, as far as the matrix has them.
std::uint32_t mask_width(const Header& h, std::uint32_t block) {
  return std::min(kMaskColumns, h.columns - block * kMaskColumns);
}

void write_int8_unit(const Slice& slice, const Header& h, const float* scales, std::int32_t* sums, std::uint8_t* unit) {
  const std::uint32_t blocks = blocks_of(h, 0), stored = stored_rows(slice.rows());
  const bool masked = h.format == Format::int8;
  auto* masks = reinterpret_cast<std::uint64_t*>(unit);
  auto* values = reinterpret_cast<std::int8_t*>(unit) +
                 (masked ? std::uint64_t{stored} * blocks * sizeof(std::uint64_t) : 0);
  for (std::uint32_t pair = 0; pair < stored; pair += kRowsTogether) {
    for (std::uint32_t block = 0; block < blocks; ++block) {
      for (std::uint32_t i = pair; i < pair + kRowsTogether; ++i, ++masks, values += masked ? 0 : kMaskColumns) {
        if (i >= slice.rows()) continue;
        const float* weights = slice.row(i) + std::size_t{block} * kMaskColumns;
        for (std::uint32_t c = 0; c < mask_width(h, block); ++c) {
          if (weights[c] == 0) continue;
          const int q = quantised(weights[c], scales[i], kLevels8);
          sums[i] += q;
          if (masked) {
            *masks |= std::uint64_t{1} << c;
            *values++ = static_cast<std::int8_t>(q);
          } else {
            values[c] = static_cast<std::int8_t>(q);
          }
        }
      }
    }
  }
}

// The header with the offsets of all that comes before the units, and in `bytes` where these begin.
Header make_sections(std::uint32_t rows, std::uint32_t columns, Format format, bool paired) {
  Header h = make_header(rows, columns, format, paired);
  const std::uint64_t offsets = std::uint64_t{h.slices} * h.panels + 1;
  std::uint64_t end = round_up<std::uint64_t>(sizeof(Header) + offsets * sizeof(std::uint64_t), kAlignment);
  const std::uint64_t per_row = round_up<std::uint64_t>(std::uint64_t{rows} * sizeof(float), kAlignment);
  if (format != Format::packed32) h.scales = std::exchange(end, end + per_row);
  if (!is_packed(format)) h.sums = std::exchange(end, end + per_row);
  h.bytes = end;
  return h;
}

// Bytes of a unit without a single zero.
std::uint64_t most_unit_bytes(const Header& h, std::uint32_t slice, std::uint32_t panel) {
  const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of(h, panel);
  if (!is_packed(h.format)) {
    const std::uint64_t stored = std::uint64_t{stored_rows(rows)} * blocks;
    return round_up<std::uint64_t>(stored * (sizeof(std::uint64_t) + kMaskColumns), kAlignment);
  }
  const std::uint32_t groups = groups_of(rows);
  return unit_bytes(h, groups, blocks, std::uint64_t{blocks} * kBlockColumns * groups);
}

template <class Word>
void unpack_unit(const Packed& packed, std::uint32_t slice, std::uint32_t panel, float* weights, std::uint8_t* mask) {
  const Header& h = *packed.header;
  const std::uint8_t* unit = packed.data + packed.units[std::uint64_t{slice} * h.panels + panel];
  const std::uint32_t groups = groups_of(rows_of(h, slice)), blocks = blocks_of(h, panel);
  auto* words = reinterpret_cast<const Word*>(unit + words_offset(groups, blocks));
  std::array<std::uint8_t, kMaxRows> order{}, before{};  // the row at each place
  for (std::uint32_t i = 0; i < kMaxRows; ++i) before[i] = static_cast<std::uint8_t>(i);
  for (std::uint32_t block = 0; block < blocks; ++block) {
    const std::uint8_t* record = unit + std::uint64_t{block} * record_bytes(groups);
    for (std::uint32_t i = 0; i < groups * kLanes; ++i) order[i] = before[record[groups + i]];
    for (std::uint32_t group = 0; group < groups; ++group) {
      for (std::uint32_t step = 0; step < record[group]; ++step, words += kLanes) {
        for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
          const Word word = words[lane];
          const std::uint32_t i = order[group * kLanes + lane];
          if (word == 0 || i >= rows_of(h, slice)) continue;
          const std::uint64_t at = std::uint64_t{matrix_row(h, slice, i)} * h.columns + panel * h.panel_columns +
                                   block * kBlockColumns + (word & (kBlockColumns - 1));
          if constexpr (sizeof(Word) == 4) {
            weights[at] = std::bit_cast<float>(word);
          } else {
            weights[at] = static_cast<float>(static_cast<std::int16_t>(word) >> 5) *
                          packed.scales[slice * h.slice_rows + i];
          }
          if (mask != nullptr) mask[at] = 1;
        }
      }
    }
    before = order;
  }
}

void unpack_int8(const Packed& packed, std::uint32_t slice, float* weights, std::uint8_t* mask) {
  const Header& h = *packed.header;
  const std::uint8_t* unit = packed.data + packed.units[slice];
  const std::uint32_t rows = rows_of(h, slice), stored = stored_rows(rows), blocks = blocks_of(h, 0);
  const bool masked = h.format == Format::int8;
  const auto* masks = reinterpret_cast<const std::uint64_t*>(unit);
  const auto* values = reinterpret_cast<const std::int8_t*>(unit) +
                       (masked ? std::uint64_t{stored} * blocks * sizeof(std::uint64_t) : 0);
  for (std::uint32_t pair = 0; pair < stored; pair += kRowsTogether) {
    for (std::uint32_t block = 0; block < blocks; ++block) {
      for (std::uint32_t i = pair; i < pair + kRowsTogether; ++i) {
        std::uint64_t bits = masked ? *masks++ : ~std::uint64_t{0};
        for (; bits != 0; bits &= bits - 1) {
          const auto c = static_cast<std::uint32_t>(std::countr_zero(bits));
          const auto value = static_cast<float>(*values++);
          if (i >= rows || c >= mask_width(h, block)) continue;
          const std::uint64_t at = std::uint64_t{matrix_row(h, slice, i)} * h.columns + block * kMaskColumns + c;
          weights[at] = value * packed.scales[slice * h.slice_rows + i];
          if (mask != nullptr) mask[at] = 1;
        }
      }
    }
  }
}

}  // namespace

std::uint64_t most_bytes(std::uint64_t rows, std::uint64_t columns, Format format, bool paired, const char*& problem) {
  problem = nullptr;
  if (rows == 0 || columns == 0 || rows > kMaxSize || columns > kMaxSize) problem = "a side is 0 or over 2^24";
  if (paired && rows % 2 != 0) problem = "an odd number of rows cannot be paired";
  if (problem != nullptr) return 0;
  const Header h = make_sections(static_cast<std::uint32_t>(rows), static_cast<std::uint32_t>(columns), format, paired);
  std::uint64_t bytes = h.bytes + kOverread;
  for (std::uint32_t s = 0; s < h.slices; ++s) {
    for (std::uint32_t panel = 0; panel < h.panels; ++panel) bytes += most_unit_bytes(h, s, panel);
  }
  return bytes;
}

Layout layout_of(const float* weights, std::uint64_t rows, std::uint64_t columns, Format format, bool paired,
                 const char*& problem) {
  problem = nullptr;
  Layout layout{make_sections(static_cast<std::uint32_t>(rows), static_cast<std::uint32_t>(columns), format, paired),
                {}};
  Header& h = layout.header;
  for (std::uint64_t i = 0; i < rows * columns; ++i) {
    if (!std::isfinite(weights[i])) problem = "a weight is infinite or not a number";
    h.nonzeros += weights[i] != 0;
  }
  if (problem != nullptr) return layout;
  std::uint64_t end = h.bytes;
  for (std::uint32_t s = 0; s < h.slices; ++s) {
    Slice slice(weights, h, s);
    for (std::uint32_t panel = 0; panel < h.panels; ++panel) {
      layout.units.push_back(end);
      end += is_packed(format) ? packed_unit_bytes(slice, h, panel) : int8_unit_bytes(slice, h);
    }
  }
  layout.units.push_back(end);
  h.bytes = end + kOverread;
  return layout;
}

void pack(const float* weights, const Layout& layout, std::uint8_t* out) {
  const auto& [h, units] = layout;
  std::memset(out, 0, h.bytes);
  std::memcpy(out, &h, sizeof(h));
  std::memcpy(out + sizeof(Header), units.data(), units.size() * sizeof(std::uint64_t));
  auto* scales = h.scales == 0 ? nullptr : reinterpret_cast<float*>(out + h.scales);
  auto* sums = h.sums == 0 ? nullptr : reinterpret_cast<std::int32_t*>(out + h.sums);
  for (std::uint32_t s = 0; s < h.slices; ++s) {
    Slice slice(weights, h, s);
    const std::uint64_t first = std::uint64_t{s} * h.slice_rows;
    for (std::uint32_t i = 0; scales != nullptr && i < slice.rows(); ++i) {
      scales[first + i] = row_scale(slice.row(i), h.columns, is_packed(h.format) ? kLevels16 : kLevels8);
    }
    for (std::uint32_t panel = 0; panel < h.panels; ++panel) {
      std::uint8_t* unit = out + units[std::uint64_t{s} * h.panels + panel];
      if (h.format == Format::packed32) write_packed_unit<std::uint32_t>(slice, h, panel, nullptr, unit);
      if (h.format == Format::packed16) write_packed_unit<std::uint16_t>(slice, h, panel, scales + first, unit);
      if (!is_packed(h.format)) write_int8_unit(slice, h, scales + first, sums + first, unit);
    }
  }
}

void unpack(const Packed& packed, float* weights, std::uint8_t* mask) {
  const Header& h = *packed.header;
  const std::uint64_t size = std::uint64_t{h.rows} * h.columns;
  std::memset(weights, 0, size * sizeof(float));
  if (mask != nullptr) std::memset(mask, 0, size);
  for (std::uint32_t slice = 0; slice < h.slices; ++slice) {
    for (std::uint32_t panel = 0; panel < h.panels; ++panel) {
      if (h.format == Format::packed32) unpack_unit<std::uint32_t>(packed, slice, panel, weights, mask);
      if (h.format == Format::packed16) unpack_unit<std::uint16_t>(packed, slice, panel, weights, mask);
      if (!is_packed(h.format)) unpack_int8(packed, slice, weights, mask);
    }
  }
}

}  // namespace owl
