// Units of packed32 and packed16.
#include <array>
#include <bit>
#include <bitset>
#include <cstring>
#include <vector>

#include "format/units.h"

namespace owl {
namespace {

// ---- Checking ----

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

template <OfWords F>
const char* check(const Header& h, Unit unit, std::uint32_t slice, std::uint32_t panel) {
  const std::uint32_t groups = groups_of(rows_of(h, slice)), blocks = blocks_of<F>(h, panel);
  const std::uint64_t words = words_offset(groups, blocks), step_bytes = kLanes * sizeof(typename F::Word);
  const auto length = static_cast<std::uint64_t>(unit.end - unit.begin);
  if (words > length) return "a unit is too short";
  std::uint64_t steps = 0, last_steps = 0;
  for (std::uint32_t block = 0; block < blocks; ++block) {
    const std::uint8_t* record = unit.begin + std::uint64_t{block} * record_bytes(groups);
    last_steps = 0;
    for (std::uint32_t group = 0; group < groups; ++group) {
      const std::uint8_t of_group = record[group];
      if (of_group > kBlockColumns) return "a group has more steps than columns";
      last_steps += of_group;
    }
    steps += last_steps;
    if (!is_permutation_of(record + groups, groups * kLanes)) return "row positions are out of range";
  }
  if (!is_permutation_of(unit.begin + std::uint64_t{blocks} * record_bytes(groups), groups * kLanes)) {
    return "row positions are out of range";
  }
  if (round_up<std::uint64_t>(words + steps * step_bytes, kAlignment) != length) return "a unit has a wrong length";
  // Five bits cannot leave a block, but the last block of a matrix may be narrower than that.
  const std::uint32_t ragged = h.columns % kBlockColumns;
  if (ragged != 0 && panel + 1 == h.panels) {
    const std::uint8_t* last = unit.begin + words + (steps - last_steps) * step_bytes;
    if (!indices_below<typename F::Word>(last, last_steps * kLanes, ragged)) return "a column index is out of range";
  }
  return nullptr;
}

// ---- Packing ----

template <OfWords F>
std::uint64_t most_bytes(const Header& h, std::uint32_t slice, std::uint32_t panel) {
  const std::uint32_t groups = groups_of(rows_of(h, slice)), blocks = blocks_of<F>(h, panel);
  const std::uint64_t words = std::uint64_t{blocks} * kBlockColumns * groups * kLanes;
  return round_up<std::uint64_t>(words_offset(groups, blocks) + words * sizeof(typename F::Word), kAlignment);
}

// The nearest fp32 number whose low 5 bits are `index`: never zero, never infinite.
std::uint32_t packed_word(Packed32, float weight, float /*scale*/, std::uint32_t index) {
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

// A stored weight is never 0, so that a word of 0 is padding and nothing else.
std::uint32_t packed_word(Packed16, float weight, float scale, std::uint32_t index) {
  const int q = quantised(weight, scale, Packed16::kLevels), smallest = weight < 0 ? -1 : 1;
  return static_cast<std::uint32_t>(q != 0 ? q : smallest) * kBlockColumns + index;
}

// The blocks of one unit, from left to right, out of strips that are copied first: the rows themselves lie so far
// apart, and often a power of two, that they would drive each other from the cache.
class Blocks {
 public:
  Blocks(const Slice& slice, const Header& h, std::uint32_t panel)
      : slice_(slice), next_(panel * h.panel_columns), columns_(h.columns), rows_(slice.rows()),
        padded_(groups_of(rows_) * kLanes), strips_(std::size_t{rows_} * kStripColumns) {}

  // Arrange the next block: rows by falling number of non-zeros, 16 to a group.
  void arrange_next() {
    in_strip_ = in_strip_ + 1 < kStripBlocks ? in_strip_ + 1 : 0;
    if (in_strip_ == 0) copy_strip();
    std::array<std::uint32_t, kBlockColumns + 2> start{};
    for (std::uint32_t i = 0; i < padded_; ++i) {
      masks_[i] = i < rows_ ? static_cast<std::uint32_t>(mask_of<kBlockColumns>(values(i))) : 0;
      counts_[i] = static_cast<std::uint8_t>(std::popcount(masks_[i]));
      ++start[kBlockColumns - counts_[i] + 1];
    }
    for (std::uint32_t n = 1; n < start.size(); ++n) start[n] += start[n - 1];
    for (std::uint32_t i = 0; i < padded_; ++i) {
      order_[start[kBlockColumns - counts_[i]]++] = static_cast<std::uint8_t>(i);
    }
  }

  // Of the block that was arranged: a row's values, and which of them are not zero; the rows in their order, and how
  // many values the first of a group, and so each of them at most, has.
  const float* values(std::uint32_t i) const {
    return strips_.data() + std::size_t{i} * kStripColumns + in_strip_ * kBlockColumns;
  }
  std::uint32_t mask(std::uint32_t i) const { return masks_[i]; }
  const std::array<std::uint8_t, kMaxRows>& order() const { return order_; }
  std::uint32_t steps(std::uint32_t group) const { return counts_[order_[group * kLanes]]; }

 private:
  static constexpr std::uint32_t kStripBlocks = 8, kStripColumns = kStripBlocks * kBlockColumns;

  void copy_strip() {
    const std::uint32_t width = std::min(kStripColumns, columns_ - next_);
    for (std::uint32_t i = 0; i < rows_; ++i) {
      float* copy = std::copy_n(slice_.row(i) + next_, width, strips_.data() + std::size_t{i} * kStripColumns);
      std::fill_n(copy, kStripColumns - width, 0.0F);
    }
    next_ += width;
  }

  const Slice& slice_;
  std::uint32_t next_;  // the first column of the next strip
  std::uint32_t columns_, rows_, padded_;
  std::vector<float> strips_;  // [rows, columns of a strip]
  std::uint32_t in_strip_ = kStripBlocks - 1;
  std::array<std::uint32_t, kMaxRows> masks_{};
  std::array<std::uint8_t, kMaxRows> counts_{}, order_{};
};

template <OfWords F>
std::uint8_t* pack(const Slice& slice, const Header& h, std::uint32_t panel, const float* scales,
                   std::int32_t* /*sums*/, std::uint8_t* unit) {
  using Word = typename F::Word;
  const std::uint32_t groups = groups_of(slice.rows()), blocks = blocks_of<F>(h, panel);
  Blocks arranged(slice, h, panel);
  std::memset(unit, 0, words_offset(groups, blocks));
  auto* words = reinterpret_cast<Word*>(unit + words_offset(groups, blocks));
  std::array<std::uint8_t, kMaxRows> place{};  // where each row was put in the block before
  for (std::uint32_t i = 0; i < kMaxRows; ++i) place[i] = static_cast<std::uint8_t>(i);
  for (std::uint32_t block = 0; block < blocks; ++block) {
    arranged.arrange_next();
    std::uint8_t* record = unit + std::uint64_t{block} * record_bytes(groups);
    for (std::uint32_t group = 0; group < groups; ++group) {
      const std::uint32_t steps = arranged.steps(group);
      std::fill_n(words, steps * kLanes, Word{0});
      record[group] = static_cast<std::uint8_t>(steps);
      for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
        const std::uint32_t i = arranged.order()[group * kLanes + lane];
        record[groups + group * kLanes + lane] = place[i];
        std::uint32_t bits = arranged.mask(i);
        if (bits == 0) continue;
        const float scale = F::kLevels != 0 ? scales[i] : 0;
        std::array<std::uint32_t, kBlockColumns> all;  // of the zeros, too: compilers vectorise it
        for (std::uint32_t c = 0; c < kBlockColumns; ++c) {
          all[c] = packed_word(F{}, arranged.values(i)[c], scale, c);
        }
        for (Word* word = words + lane; bits != 0; bits &= bits - 1, word += kLanes) {
          *word = static_cast<Word>(all[std::countr_zero(bits)]);
        }
      }
      words += steps * kLanes;
    }
    for (std::uint32_t i = 0; i < groups * kLanes; ++i) place[arranged.order()[i]] = static_cast<std::uint8_t>(i);
  }
  std::memcpy(unit + std::uint64_t{blocks} * record_bytes(groups), place.data(), groups * kLanes);
  return filled_up(unit, reinterpret_cast<std::uint8_t*>(words));
}

// ---- Unpacking ----

template <OfWords F>
void unpack(const Packed& packed, std::uint32_t slice, std::uint32_t panel, float* weights, std::uint8_t* mask) {
  using Word = typename F::Word;
  const Header& h = packed.header;
  const Unit unit = unit_of(packed, slice, panel);
  const std::uint32_t rows = rows_of(h, slice), groups = groups_of(rows), blocks = blocks_of<F>(h, panel);
  auto* words = reinterpret_cast<const Word*>(unit.begin + words_offset(groups, blocks));
  std::array<std::uint8_t, kMaxRows> order{}, before{};  // the row at each place
  for (std::uint32_t i = 0; i < kMaxRows; ++i) before[i] = static_cast<std::uint8_t>(i);
  for (std::uint32_t block = 0; block < blocks; ++block) {
    const std::uint8_t* record = unit.begin + std::uint64_t{block} * record_bytes(groups);
    const std::uint32_t first = panel * h.panel_columns + block * kBlockColumns;
    for (std::uint32_t i = 0; i < groups * kLanes; ++i) order[i] = before[record[groups + i]];
    for (std::uint32_t group = 0; group < groups; ++group) {
      const std::ptrdiff_t count = group_end(words, record[group], unit) - words;
      for (std::ptrdiff_t at = 0; at < count; ++at) {
        const std::uint32_t i = order[group * kLanes + at % kLanes];
        const Word word = words[at];
        const std::uint32_t column = first + word % kBlockColumns;
        if (i >= rows || word == 0 || column >= h.columns) continue;
        const std::uint64_t to = std::uint64_t{matrix_row(h, slice, i)} * h.columns + column;
        weights[to] = F::value(word);
        if constexpr (F::kLevels != 0) weights[to] *= packed.scales[slice * h.slice_rows + i];
        if (mask != nullptr) mask[to] = 1;
      }
      words += count;
    }
    before = order;
  }
}

template <OfWords F>
constexpr Units kWordUnits = {check<F>, most_bytes<F>, pack<F>, unpack<F>};

}  // namespace

constexpr Units Packed32::kUnits = kWordUnits<Packed32>;
constexpr Units Packed16::kUnits = kWordUnits<Packed16>;

}  // namespace owl
