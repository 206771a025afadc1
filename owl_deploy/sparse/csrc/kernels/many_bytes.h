// Many tokens and 8-bit weights.
#pragma once

#include <bit>

#include "kernels/many_rows.h"

namespace owl {
namespace {

// Bytes as floats, by their bits: a broadcast from memory is one load, a conversion would take turns with the products.
constexpr auto kFloats = [] {
  struct Table {
    float of[256];
  } table{};
  for (int i = 0; i < 256; ++i) table.of[i] = static_cast<float>(static_cast<std::int8_t>(i));
  return table;
}();

template <class Isa>
struct ManyKernel<Isa, Int8> {
  static std::uint32_t slices_together(const Header& h) { return kMaxRows / h.slice_rows; }

  static void multiply(const Packed& packed, Slices slices, const float* x, std::int64_t stride, float* sums) {
    const Header& h = packed.header;
    const std::uint32_t blocks = blocks_of<Int8>(h, 0);
    const auto* const last = last_values<std::int8_t>(packed);
    struct Pair {
      const std::uint64_t* masks;  // of both rows, in the block that is next
      const std::int8_t* values;
    } pairs[kMaxRows / kRowsTogether];
    std::uint32_t count = 0;
    for (std::uint32_t slice = slices.first; slice < slices.end; ++slice) {
      const std::uint8_t* const unit = unit_of(packed, slice, 0).begin;
      const auto* masks = reinterpret_cast<const std::uint64_t*>(unit);
      const auto* values = reinterpret_cast<const std::int8_t*>(unit + values_offset<Int8>(rows_of(h, slice), blocks));
      for (std::uint32_t row = 0; row < rows_of(h, slice); row += kRowsTogether) {
        pairs[count++] = {masks, values};
        std::ptrdiff_t stored = 0;
        for (std::uint32_t i = 0; i < blocks * kRowsTogether; ++i) stored += std::popcount(*masks++);
        values = advanced(values, stored, last);
      }
    }
    for (std::uint32_t block = 0; block < blocks; ++block, x += kMaskColumns * stride) {
      for (std::uint32_t i = 0; i < count * kRowsTogether; ++i) {
        Pair& pair = pairs[i / kRowsTogether];
        const std::uint64_t mask = *pair.masks++;
        add_rows<Isa>(sums + i * stride, x, stride, [at = pair.values, mask] {
          return [at, bits = mask](std::uint32_t& column, float& weight) mutable {
            if (bits == 0) return false;
            column = static_cast<std::uint32_t>(std::countr_zero(bits));
            bits &= bits - 1;
            weight = kFloats.of[static_cast<std::uint8_t>(*at++)];
            return true;
          };
        });
        pair.values = advanced(pair.values, std::popcount(mask), last);
      }
    }
  }
};

// Two rows of dense weights at a time: an input is loaded once for both.
template <class Isa, int kVectors>
[[gnu::always_inline]] inline void add_two_rows(float* sums, const float* x, std::int64_t stride,
                                                const std::int8_t* const* weights) {
  typename Isa::Lanes sum[2][kVectors];
  unrolled<2 * kVectors>([&](auto i) {
    constexpr int row = i / kVectors, v = i % kVectors;
    sum[row][v] = Isa::load(sums + row * stride + v * kLanes);
  });
  for (std::uint32_t column = 0; column < kBlockColumns; ++column, x += stride) {
    const auto first = Isa::broadcast(kFloats.of[static_cast<std::uint8_t>(weights[0][column])]);
    const auto second = Isa::broadcast(kFloats.of[static_cast<std::uint8_t>(weights[1][column])]);
    unrolled<kVectors>([&](auto v) {
      const auto inputs = Isa::load(x + v * kLanes);
      sum[0][v] = Isa::multiply_add(first, inputs, sum[0][v]);
      sum[1][v] = Isa::multiply_add(second, inputs, sum[1][v]);
    });
  }
  unrolled<2 * kVectors>([&](auto i) {
    constexpr int row = i / kVectors, v = i % kVectors;
    Isa::store(sums + row * stride + v * kLanes, sum[row][v]);
  });
}

template <class Isa, int kMost>
[[gnu::always_inline]] inline void add_row_pairs(float* sums, const float* x, std::int64_t stride, std::int64_t left,
                                                 const std::int8_t* const* weights) {
  for (; left >= kMost; left -= kMost, sums += kMost * kLanes, x += kMost * kLanes) {
    add_two_rows<Isa, kMost>(sums, x, stride, weights);
  }
  if constexpr (kMost > 1) add_row_pairs<Isa, kMost / 2>(sums, x, stride, left, weights);
}

template <class Isa>
struct ManyKernel<Isa, Dense8> {
  static std::uint32_t slices_together(const Header& h) { return kMaxRows / h.slice_rows; }

  static void multiply(const Packed& packed, Slices slices, const float* x, std::int64_t stride, float* sums) {
    const Header& h = packed.header;
    const std::uint32_t columns = padded_columns<Dense8>(h);
    for (std::uint32_t column = 0; column < columns; column += kBlockColumns, x += kBlockColumns * stride) {
      float* to = sums;
      for (std::uint32_t slice = slices.first; slice < slices.end; ++slice) {
        const auto* values = reinterpret_cast<const std::int8_t*>(unit_of(packed, slice, 0).begin);
        for (std::uint32_t row = 0; row < rows_of(h, slice); row += kRowsTogether, to += kRowsTogether * stride) {
          const std::size_t block = std::size_t{row} * columns + column / kMaskColumns * kRowsTogether * kMaskColumns;
          const std::int8_t* first = values + block + column % kMaskColumns;
          const std::int8_t* const pair[kRowsTogether] = {first, first + kMaskColumns};
          add_row_pairs<Isa, Isa::kPairVectors>(to, x, stride, stride / kLanes, pair);
        }
      }
    }
  }
};

}  // namespace
}  // namespace owl
