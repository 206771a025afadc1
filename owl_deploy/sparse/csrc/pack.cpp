#include "pack.h"

#include <array>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
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
  constexpr std::int32_t kBlock = kBlockColumns, kInfinity = 0x7F800000;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(weight), sign = bits & 0x80000000;
  const auto magnitude = static_cast<std::int32_t>(bits & 0x7FFFFFFF);
  std::int32_t nearest = (magnitude & ~(kBlock - 1)) | static_cast<std::int32_t>(index);
  const std::int32_t error = nearest - magnitude;
  nearest -= error > kBlock / 2 ? kBlock : 0;
  nearest += error < -kBlock / 2 ? kBlock : 0;
  nearest += nearest <= 0 ? kBlock : 0;
  nearest -= nearest >= kInfinity ? kBlock : 0;
  return sign | static_cast<std::uint32_t>(nearest);
}

// To the nearest integer, ties to even. What a sum with 1.5 * 2^23 loses is the fraction; compilers vectorise it.
int quantised(float weight, float scale, int levels) {
  constexpr float kWholeNumbers = 0x1.8p23f;
  const float rounded = (weight / scale + kWholeNumbers) - kWholeNumbers;
  return std::clamp(static_cast<int>(rounded), -levels, levels);
}

// A stored weight is never 0, so that a word of 0 is padding and nothing else.
std::uint32_t word16(float weight, float scale, std::uint32_t index) {
  const int q = quantised(weight, scale, kLevels16), smallest = weight < 0 ? -1 : 1;
  return static_cast<std::uint32_t>(q != 0 ? q : smallest) * kBlockColumns + index;
}

float row_scale(const float* row, std::uint64_t columns, int levels) {
  std::int32_t bits = 0;  // the larger of two finite numbers without a sign has the larger bits
  for (std::uint64_t c = 0; c < columns; ++c) bits = std::max(bits, std::bit_cast<std::int32_t>(row[c]) & 0x7FFFFFFF);
  // Below the largest number, so that `levels` times the scale, rounded, is one.
  const float largest = std::min(std::bit_cast<float>(bits), 0x1.fffffp127f);
  return largest == 0 ? 0 : std::max(largest / static_cast<float>(levels), FLT_MIN);
}

// Which of some values, a multiple of 8 and at most 64, are not zero, as bits.
template <std::size_t kCount>
std::uint64_t mask_of(const float* values) {
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

// The rows of one slice. Blocks are taken from left to right, out of strips that are copied first: the rows themselves
// lie so far apart, and often a power of two, that they would drive each other from the cache.
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

  // Arrange a block: rows by falling number of non-zeros, 16 to a group.
  void arrange(std::uint32_t block) {
    if (block / kStripBlocks != strip_) copy_strip(block / kStripBlocks);
    block_ = block % kStripBlocks;
    const std::uint32_t padded = groups() * kLanes;
    std::array<std::uint32_t, kBlockColumns + 2> start{};
    for (std::uint32_t i = 0; i < padded; ++i) {
      masks_[i] = i < count_ ? static_cast<std::uint32_t>(mask_of<kBlockColumns>(values(i))) : 0;
      counts_[i] = static_cast<std::uint8_t>(std::popcount(masks_[i]));
      ++start[kBlockColumns - counts_[i] + 1];
    }
    for (std::uint32_t n = 1; n < start.size(); ++n) start[n] += start[n - 1];
    for (std::uint32_t i = 0; i < padded; ++i) {
      order_[start[kBlockColumns - counts_[i]]++] = static_cast<std::uint8_t>(i);
    }
  }

  // Of the block that was arranged: a row's values, and which of them are not zero; the rows in their order, and how
  // many values the first of a group, and so each of them at most, has.
  const float* values(std::uint32_t i) const { return strips_.data() + (i * kStripBlocks + block_) * kBlockColumns; }
  std::uint32_t mask(std::uint32_t i) const { return masks_[i]; }
  const std::array<std::uint8_t, kMaxRows>& order() const { return order_; }
  std::uint32_t steps(std::uint32_t group) const { return counts_[order_[group * kLanes]]; }

 private:
  static constexpr std::uint32_t kStripBlocks = 8;

  void copy_strip(std::uint32_t strip) {
    constexpr std::uint32_t kColumns = kStripBlocks * kBlockColumns;
    strips_.resize(std::size_t{count_} * kColumns);
    const std::uint32_t first = strip * kColumns, width = std::min(kColumns, columns_ - first);
    for (std::uint32_t i = 0; i < count_; ++i) {
      float* copy = std::copy_n(rows_[i] + first, width, strips_.data() + std::size_t{i} * kColumns);
      std::fill_n(copy, kColumns - width, 0.0F);
    }
    strip_ = strip;
  }

  std::uint32_t columns_, count_;
  std::array<const float*, kMaxRows> rows_{};
  std::vector<float> strips_;                               // [rows, columns of a strip]
  std::uint32_t strip_ = std::numeric_limits<std::uint32_t>::max(), block_ = 0;
  std::array<std::uint32_t, kMaxRows> masks_{};
  std::array<std::uint8_t, kMaxRows> counts_{}, order_{};
};

// Zeros up to the next multiple of 64 bytes, counted from `unit`; where they end.
std::uint8_t* filled_up(const std::uint8_t* unit, std::uint8_t* end) {
  const auto length = static_cast<std::uint64_t>(end - unit);
  return std::fill_n(end, round_up<std::uint64_t>(length, kAlignment) - length, std::uint8_t{0});
}

template <class Word>
std::uint8_t* write_packed_unit(Slice& slice, const Header& h, std::uint32_t panel, const float* scales,
                                std::uint8_t* unit) {
  const std::uint32_t groups = slice.groups(), blocks = blocks_of(h, panel);
  const std::uint32_t first = panel * h.panel_columns / kBlockColumns;
  std::memset(unit, 0, words_offset(groups, blocks));
  auto* words = reinterpret_cast<Word*>(unit + words_offset(groups, blocks));
  std::array<std::uint8_t, kMaxRows> place{};  // where each row was put in the block before
  for (std::uint32_t i = 0; i < kMaxRows; ++i) place[i] = static_cast<std::uint8_t>(i);
  for (std::uint32_t block = 0; block < blocks; ++block) {
    slice.arrange(first + block);
    std::uint8_t* record = unit + std::uint64_t{block} * record_bytes(groups);
    for (std::uint32_t group = 0; group < groups; ++group) {
      const std::uint32_t steps = slice.steps(group);
      std::fill_n(words, steps * kLanes, Word{0});
      record[group] = static_cast<std::uint8_t>(steps);
      for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
        const std::uint32_t i = slice.order()[group * kLanes + lane];
        record[groups + group * kLanes + lane] = place[i];
        std::uint32_t bits = slice.mask(i);
        if (bits == 0) continue;
        std::array<std::uint32_t, kBlockColumns> all;  // of the zeros, too: compilers vectorise it
        for (std::uint32_t c = 0; c < kBlockColumns; ++c) {
          if constexpr (sizeof(Word) == 4) {
            all[c] = word32(slice.values(i)[c], c);
          } else {
            all[c] = word16(slice.values(i)[c], scales[i], c);
          }
        }
        for (Word* word = words + lane; bits != 0; bits &= bits - 1, word += kLanes) {
          *word = static_cast<Word>(all[std::countr_zero(bits)]);
        }
      }
      words += steps * kLanes;
    }
    for (std::uint32_t i = 0; i < groups * kLanes; ++i) place[slice.order()[i]] = static_cast<std::uint8_t>(i);
  }
  std::memcpy(unit + std::uint64_t{blocks} * record_bytes(groups), place.data(), groups * kLanes);
  return filled_up(unit, reinterpret_cast<std::uint8_t*>(words));
}

// The columns of block `block`, as far as the matrix has them.
std::uint32_t mask_width(const Header& h, std::uint32_t block) {
  return std::min(kMaskColumns, h.columns - block * kMaskColumns);
}

std::uint8_t* write_int8_unit(const Slice& slice, const Header& h, const float* scales, std::int32_t* sums,
                              std::uint8_t* unit) {
  const std::uint32_t blocks = blocks_of(h, 0), stored = stored_rows(slice.rows());
  const bool masked = h.format == Format::int8;
  auto* masks = reinterpret_cast<std::uint64_t*>(unit);
  std::uint8_t* values = unit + values_offset(h, slice.rows());
  for (std::uint32_t pair = 0; pair < stored; pair += kRowsTogether) {
    for (std::uint32_t block = 0; block < blocks; ++block) {
      for (std::uint32_t i = pair; i < pair + kRowsTogether; ++i) {
        std::array<float, kMaskColumns> weights{};
        float scale = 1;
        if (i < slice.rows()) {
          std::copy_n(slice.row(i) + std::size_t{block} * kMaskColumns, mask_width(h, block), weights.data());
          if (scales[i] != 0) scale = scales[i];
        }
        std::array<std::int8_t, kMaskColumns> quantised_weights;
        std::int32_t sum = 0;
        for (std::uint32_t c = 0; c < kMaskColumns; ++c) {
          const int q = quantised(weights[c], scale, kLevels8);
          quantised_weights[c] = static_cast<std::int8_t>(q);
          sum += q;
        }
        if (i < slice.rows()) sums[i] += sum;
        if (!masked) {
          std::memcpy(values, quantised_weights.data(), kMaskColumns);
          values += kMaskColumns;
          continue;
        }
        *masks++ = mask_of<kMaskColumns>(weights.data());
        for (std::uint32_t c = 0; c < kMaskColumns; ++c) {  // without a branch: the next one takes a zero's place
          *values = static_cast<std::uint8_t>(quantised_weights[c]);
          values += weights[c] != 0;
        }
      }
    }
  }
  return filled_up(unit, values);
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

// Bytes of a unit without a single zero. One more may be written, past the last weight of 8 bits.
std::uint64_t most_unit_bytes(const Header& h, std::uint32_t slice, std::uint32_t panel) {
  const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of(h, panel);
  if (!is_packed(h.format)) {
    const std::uint64_t stored = std::uint64_t{stored_rows(rows)} * blocks;
    return round_up<std::uint64_t>(stored * (sizeof(std::uint64_t) + kMaskColumns), kAlignment);
  }
  const std::uint32_t groups = groups_of(rows);
  const std::uint64_t words = std::uint64_t{blocks} * kBlockColumns * groups * kLanes;
  return round_up<std::uint64_t>(words_offset(groups, blocks) + words * word_bytes(h.format), kAlignment);
}

template <class Word>
void unpack_unit(const Packed& packed, std::uint32_t slice, std::uint32_t panel, float* weights, std::uint8_t* mask) {
  const Header& h = *packed.header;
  const std::uint8_t* unit = packed.data + packed.units[std::uint64_t{slice} * h.panels + panel];
  const std::uint32_t rows = rows_of(h, slice), groups = groups_of(rows), blocks = blocks_of(h, panel);
  auto* words = reinterpret_cast<const Word*>(unit + words_offset(groups, blocks));
  std::array<std::uint8_t, kMaxRows> order{}, before{};  // the row at each place
  for (std::uint32_t i = 0; i < kMaxRows; ++i) before[i] = static_cast<std::uint8_t>(i);
  for (std::uint32_t block = 0; block < blocks; ++block) {
    const std::uint8_t* record = unit + std::uint64_t{block} * record_bytes(groups);
    for (std::uint32_t i = 0; i < groups * kLanes; ++i) order[i] = before[record[groups + i]];
    for (std::uint32_t group = 0; group < groups; words += record[group++] * kLanes) {
      for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
        const std::uint32_t i = order[group * kLanes + lane];
        if (i >= rows) continue;
        const std::uint64_t at = std::uint64_t{matrix_row(h, slice, i)} * h.columns + panel * h.panel_columns +
                                 block * kBlockColumns;
        const float scale = sizeof(Word) == 4 ? 0 : packed.scales[slice * h.slice_rows + i];
        for (std::uint32_t step = 0; step < record[group]; ++step) {
          const Word word = words[step * kLanes + lane];
          if (word == 0) continue;
          const std::uint32_t column = word & (kBlockColumns - 1);
          if constexpr (sizeof(Word) == 4) {
            weights[at + column] = std::bit_cast<float>(word);
          } else {
            weights[at + column] = static_cast<float>(static_cast<std::int16_t>(word) >> 5) * scale;
          }
          if (mask != nullptr) mask[at + column] = 1;
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
  const auto* values = reinterpret_cast<const std::int8_t*>(unit + values_offset(h, rows));
  for (std::uint32_t pair = 0; pair < stored; pair += kRowsTogether) {
    for (std::uint32_t block = 0; block < blocks; ++block) {
      for (std::uint32_t i = pair; i < pair + kRowsTogether; ++i) {
        std::uint64_t bits = masked ? *masks++ : ~std::uint64_t{0};
        if (i >= rows) {  // a second row that is not there
          values += masked ? 0 : kMaskColumns;
          continue;
        }
        const std::uint64_t at = std::uint64_t{matrix_row(h, slice, i)} * h.columns + block * kMaskColumns;
        const float scale = packed.scales[slice * h.slice_rows + i];
        for (; bits != 0; bits &= bits - 1) {
          const auto c = static_cast<std::uint32_t>(std::countr_zero(bits));
          const auto value = static_cast<float>(*values++);
          if (c >= mask_width(h, block)) continue;
          weights[at + c] = value * scale;
          if (mask != nullptr) mask[at + c] = 1;
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

std::uint64_t pack(const float* weights, std::uint64_t rows, std::uint64_t columns, Format format, bool paired,
                   std::uint8_t* out, const char*& problem) {
  Header h = make_sections(static_cast<std::uint32_t>(rows), static_cast<std::uint32_t>(columns), format, paired);
  bool finite = true;
  for (std::uint64_t i = 0; i < rows * columns; ++i) {
    finite &= std::fabs(weights[i]) <= FLT_MAX;
    h.nonzeros += weights[i] != 0;
  }
  problem = finite ? nullptr : "a weight is infinite or not a number";
  if (!finite) return 0;
  std::memset(out, 0, h.bytes);
  auto* units = reinterpret_cast<std::uint64_t*>(out + sizeof(Header));
  auto* scales = h.scales == 0 ? nullptr : reinterpret_cast<float*>(out + h.scales);
  auto* sums = h.sums == 0 ? nullptr : reinterpret_cast<std::int32_t*>(out + h.sums);
  std::uint8_t* end = out + h.bytes;
  for (std::uint32_t s = 0; s < h.slices; ++s) {
    Slice slice(weights, h, s);
    const std::uint64_t first = std::uint64_t{s} * h.slice_rows;
    for (std::uint32_t i = 0; scales != nullptr && i < slice.rows(); ++i) {
      scales[first + i] = row_scale(slice.row(i), h.columns, is_packed(format) ? kLevels16 : kLevels8);
    }
    for (std::uint32_t panel = 0; panel < h.panels; ++panel) {
      *units++ = static_cast<std::uint64_t>(end - out);
      if (format == Format::packed32) {
        end = write_packed_unit<std::uint32_t>(slice, h, panel, nullptr, end);
      } else if (format == Format::packed16) {
        end = write_packed_unit<std::uint16_t>(slice, h, panel, scales + first, end);
      } else {
        end = write_int8_unit(slice, h, scales + first, sums + first, end);
      }
    }
  }
  *units = static_cast<std::uint64_t>(end - out);
  std::memset(end, 0, kOverread);
  h.bytes = *units + kOverread;
  std::memcpy(out, &h, sizeof(h));
  return h.bytes;
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
