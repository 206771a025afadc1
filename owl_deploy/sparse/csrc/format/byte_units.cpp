// Units of int8 and dense8.
#include <array>
#include <bit>
#include <cstring>

#include "format/units.h"

namespace owl {
namespace {

template <OfBytes F>
const char* check(const Header& h, Unit unit, std::uint32_t slice, std::uint32_t /*panel*/) {
  const std::uint32_t rows = rows_of(h, slice), blocks = blocks_of<F>(h, 0);
  const std::uint64_t stored = stored_rows(rows), mask_bytes = values_offset<F>(rows, blocks);
  const auto length = static_cast<std::uint64_t>(unit.end - unit.begin);
  std::uint64_t values = stored * blocks * kMaskColumns;
  if constexpr (F::kMasked) {
    if (mask_bytes > length) return "a unit is too short";
    const std::uint32_t ragged = h.columns % kMaskColumns;
    const std::uint64_t beyond = ragged == 0 ? 0 : ~std::uint64_t{0} << ragged;
    values = 0;
    for (std::uint64_t i = 0; i < stored * blocks; ++i) {
      std::uint64_t mask;
      std::memcpy(&mask, unit.begin + i * sizeof(mask), sizeof(mask));
      values += std::popcount(mask);
      const std::uint64_t row = i / (std::uint64_t{blocks} * kRowsTogether) * kRowsTogether + i % kRowsTogether;
      if (row >= rows && mask != 0) return "a row is out of range";
      const bool last = i / kRowsTogether % blocks == blocks - 1;
      if (last && (mask & beyond) != 0) return "a column index is out of range";
    }
  }
  return round_up(mask_bytes + values, std::uint64_t{kAlignment}) == length ? nullptr : "a unit has a wrong length";
}

template <OfBytes F>
std::uint64_t most_bytes(const Header& h, std::uint32_t slice, std::uint32_t /*panel*/) {
  const std::uint64_t stored = std::uint64_t{stored_rows(rows_of(h, slice))} * blocks_of<F>(h, 0);
  return round_up<std::uint64_t>(stored * (sizeof(std::uint64_t) + kMaskColumns), kAlignment);
}

// The columns of block `block`, as far as the matrix has them.
std::uint32_t mask_width(const Header& h, std::uint32_t block) {
  return std::min(kMaskColumns, h.columns - block * kMaskColumns);
}

template <OfBytes F>
std::uint8_t* pack(const Slice& slice, const Header& h, std::uint32_t /*panel*/, const float* scales,
                   std::int32_t* sums, std::uint8_t* unit) {
  const std::uint32_t blocks = blocks_of<F>(h, 0), stored = stored_rows(slice.rows());
  auto* masks = reinterpret_cast<std::uint64_t*>(unit);
  std::uint8_t* values = unit + values_offset<F>(slice.rows(), blocks);
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
          const int q = quantised(weights[c], scale, F::kLevels);
          quantised_weights[c] = static_cast<std::int8_t>(q);
          sum += q;
        }
        if (i < slice.rows()) sums[i] += sum;
        if constexpr (!F::kMasked) {
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

template <OfBytes F>
void unpack(const Packed& packed, std::uint32_t slice, std::uint32_t panel, float* weights, std::uint8_t* mask) {
  const Header& h = packed.header;
  const Unit unit = unit_of(packed, slice, panel);
  const std::uint32_t rows = rows_of(h, slice), stored = stored_rows(rows), blocks = blocks_of<F>(h, 0);
  const auto* masks = reinterpret_cast<const std::uint64_t*>(unit.begin);
  const auto* values = reinterpret_cast<const std::int8_t*>(unit.begin + values_offset<F>(rows, blocks));
  const auto* const last = last_values<std::int8_t>(packed);
  for (std::uint32_t pair = 0; pair < stored; pair += kRowsTogether) {
    for (std::uint32_t block = 0; block < blocks; ++block) {
      for (std::uint32_t i = pair; i < pair + kRowsTogether; ++i) {
        std::uint64_t bits = F::kMasked ? *masks++ : ~std::uint64_t{0};
        const std::int8_t* next = values;
        values = advanced(values, std::popcount(bits), last);
        if (i >= rows) continue;  // a second row that is not there
        const std::uint64_t at = std::uint64_t{matrix_row(h, slice, i)} * h.columns + block * kMaskColumns;
        const float scale = packed.scales[slice * h.slice_rows + i];
        for (; bits != 0; bits &= bits - 1) {
          const auto c = static_cast<std::uint32_t>(std::countr_zero(bits));
          const auto value = static_cast<float>(*next++);
          if (c >= mask_width(h, block)) continue;
          weights[at + c] = value * scale;
          if (mask != nullptr) mask[at + c] = 1;
        }
      }
    }
  }
}

template <OfBytes F>
constexpr Units kByteUnits = {check<F>, most_bytes<F>, pack<F>, unpack<F>};

}  // namespace

constexpr Units Int8::kUnits = kByteUnits<Int8>;
constexpr Units Dense8::kUnits = kByteUnits<Dense8>;

}  // namespace owl
