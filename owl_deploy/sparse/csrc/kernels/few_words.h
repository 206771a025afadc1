// Few tokens and weights that carry their columns: a register holds one weight for each of 16 rows, and is its own
// index into the 32 inputs of the block.
#pragma once

#include <cstring>

#include "kernels/kernel.h"

namespace owl {
namespace {

template <class Isa, OfWords F>
struct FewKernel<Isa, F> {
  static constexpr int kTokens = 4;

  // fp32, padded to whole blocks.
  static std::size_t input_bytes(const Header& h) { return padded_columns<F>(h) * sizeof(float); }

  static void prepare(const Header& h, const float* x, std::byte* inputs) {
    std::memcpy(inputs, x, h.columns * sizeof(float));
    std::memset(inputs + h.columns * sizeof(float), 0, (padded_columns<F>(h) - h.columns) * sizeof(float));
  }

  template <int kCount>
  static void multiply(const Packed& packed, std::uint32_t slice, std::uint32_t panel, std::byte* const* inputs,
                       float (*sums)[kMaxRows]) {
    using Word = typename F::Word;
    const Header& h = packed.header;
    const Unit unit = unit_of(packed, slice, panel);
    const std::uint32_t groups = groups_of(rows_of(h, slice)), blocks = blocks_of<F>(h, panel);
    const auto* words = reinterpret_cast<const Word*>(unit.begin + words_offset(groups, blocks));
    const float* x[kCount];
    for (int t = 0; t < kCount; ++t) {
      x[t] = reinterpret_cast<const float*>(inputs[t]) + std::size_t{panel} * h.panel_columns;
    }
    alignas(64) float buffers[2][kCount][kMaxRows];  // the rows' sums, as the last block and as this one orders them
    std::memset(buffers[0], 0, sizeof(buffers[0]));
    for (int t = 0; t < kCount; ++t) {  // positions that were rewritten may be beyond the slice's rows
      std::memset(buffers[1][t] + groups * kLanes, 0, (kMaxRows - groups * kLanes) * sizeof(float));
    }
    const std::uint8_t* record = unit.begin;
    for (std::uint32_t block = 0; block < blocks; ++block, record += record_bytes(groups)) {
      const auto& from = buffers[block % 2];
      auto& to = buffers[1 - block % 2];
      typename Isa::Table table[kCount];
      unrolled<kCount>([&](auto t) { table[t] = Isa::table(x[t] + std::size_t{block} * kBlockColumns); });
      for (std::uint32_t group = 0; group < groups; ++group) {
        const std::uint8_t* places = record + groups + std::size_t{group} * kLanes;
        typename Isa::Lanes sum[kCount];
        unrolled<kCount>([&](auto t) { sum[t] = Isa::gather(from[t], places); });
        const Word* const end = group_end(words, record[group], unit);
        for (; words != end; words += kLanes) {
          Isa::prefetch(words);
          const auto word = Isa::load_words(words);
          const auto weight = Isa::template weight<Word>(word);
          unrolled<kCount>([&](auto t) { sum[t] = Isa::multiply_add(weight, Isa::lookup(table[t], word), sum[t]); });
        }
        unrolled<kCount>([&](auto t) { Isa::store(to[t] + std::size_t{group} * kLanes, sum[t]); });
      }
    }
    for (std::uint32_t group = 0; group < groups; ++group) {
      for (int t = 0; t < kCount; ++t) {
        Isa::store(sums[t] + std::size_t{group} * kLanes,
                   Isa::gather(buffers[blocks % 2][t], record + std::size_t{group} * kLanes));
      }
    }
  }
};

}  // namespace
}  // namespace owl
