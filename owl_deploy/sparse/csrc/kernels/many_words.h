// Many tokens and weights that carry their columns.
#pragma once

#include "kernels/many_rows.h"

namespace owl {
namespace {

template <class Isa, OfWords F>
struct ManyKernel<Isa, F> {
  static std::uint32_t slices_together(const Header&) { return 1; }

  // Positions are bytes: whatever they say, they stay among the 256 rows of `sums`.
  static void multiply(const Packed& packed, Slices slices, const float* x, std::int64_t stride, float* sums) {
    using Word = typename F::Word;
    const Header& h = packed.header;
    const std::uint32_t groups = groups_of(rows_of(h, slices.first));
    for (std::uint32_t panel = 0; panel < h.panels; ++panel) {
      const Unit unit = unit_of(packed, slices.first, panel);
      const std::uint32_t blocks = blocks_of<F>(h, panel);
      const auto* words = reinterpret_cast<const Word*>(unit.begin + words_offset(groups, blocks));
      std::uint8_t order[2][kMaxRows] = {};  // the row at each place, in the last block and in this one
      for (std::uint32_t i = 0; i < kMaxRows; ++i) order[0][i] = static_cast<std::uint8_t>(i);
      for (std::uint32_t block = 0; block < blocks; ++block) {
        const std::uint8_t* record = unit.begin + std::size_t{block} * record_bytes(groups);
        const std::uint8_t* before = order[block % 2];
        std::uint8_t* now = order[1 - block % 2];
        for (std::uint32_t group = 0; group < groups; ++group) {
          const std::ptrdiff_t count = group_end(words, record[group], unit) - words;
          for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
            const std::uint32_t place = group * kLanes + lane;
            now[place] = before[record[groups + place]];
            const Word* lane_words = words + lane;
            add_rows<Isa>(sums + now[place] * stride, x, stride, [=] {
              return [at = lane_words, end = lane_words + count](std::uint32_t& column, float& weight) mutable {
                if (at == end) return false;  // padding is multiplied, too: equal counts let the CPU foresee the end
                const Word word = *at;
                column = word % kBlockColumns;
                weight = F::value(word);
                at += kLanes;
                return true;
              };
            });
          }
          words += count;
        }
        x += kBlockColumns * stride;
      }
    }
  }
};

}  // namespace
}  // namespace owl
