#include "format/pack.h"

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

#include "format/layout.h"
#include "format/units.h"

namespace owl {
namespace {

constexpr std::uint32_t kUnits = 32;       // wanted of a matrix, so that many threads find work
constexpr std::uint32_t kPanelBlocks = 4;  // a panel is no narrower

template <class F>
Header make_header(std::uint32_t rows, std::uint32_t columns, bool paired) {
  Header h{};
  h.magic = kMagic;
  h.version = kVersion;
  h.format = F::kFormat;
  h.paired = paired ? 1 : 0;
  h.rows = rows;
  h.columns = columns;
  const std::uint32_t slices = ceil_div(rows, F::kSliceRows);  // of equal size, as far as groups of rows allow
  h.slice_rows = round_up(ceil_div(rows, slices), 2 * kLanes);
  const std::uint32_t halves = paired ? 2 : 1;
  h.slices = ceil_div(rows / halves, h.slice_rows / halves);
  const std::uint32_t blocks = ceil_div(columns, F::kColumns);
  std::uint32_t panels = 1;
  if (F::kPanels) panels = std::clamp(ceil_div(kUnits, h.slices), 1U, std::max(1U, blocks / kPanelBlocks));
  h.panel_columns = ceil_div(blocks, panels) * F::kColumns;
  h.panels = ceil_div(columns, h.panel_columns);
  return h;
}

float row_scale(const float* row, std::uint64_t columns, int levels) {
  std::int32_t bits = 0;  // the larger of two finite numbers without a sign has the larger bits
  for (std::uint64_t c = 0; c < columns; ++c) bits = std::max(bits, std::bit_cast<std::int32_t>(row[c]) & 0x7FFFFFFF);
  // Below the largest number, so that `levels` times the scale, rounded, is one.
  const float largest = std::min(std::bit_cast<float>(bits), 0x1.fffffp127f);
  return largest == 0 ? 0 : std::max(largest / static_cast<float>(levels), FLT_MIN);
}

// The header with the offsets of all that comes before the units, and in `bytes` where these begin.
Header make_sections(std::uint32_t rows, std::uint32_t columns, Format format, bool paired) {
  return with_format(format, [&](auto f) {
    using F = decltype(f);
    Header h = make_header<F>(rows, columns, paired);
    const std::uint64_t offsets = std::uint64_t{h.slices} * h.panels + 1;
    std::uint64_t end = round_up<std::uint64_t>(sizeof(Header) + offsets * sizeof(std::uint64_t), kAlignment);
    const std::uint64_t per_row = round_up<std::uint64_t>(std::uint64_t{rows} * sizeof(float), kAlignment);
    if (F::kLevels != 0) h.scales = std::exchange(end, end + per_row);
    if (F::kSums) h.sums = std::exchange(end, end + per_row);
    h.bytes = end;
    return h;
  });
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
    for (std::uint32_t panel = 0; panel < h.panels; ++panel) bytes += units_of(format).most_bytes(h, s, panel);
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
  const int levels = with_format(format, [](auto f) { return f.kLevels; });
  std::uint8_t* end = out + h.bytes;
  for (std::uint32_t s = 0; s < h.slices; ++s) {
    const Slice slice(weights, h, s);
    const std::uint64_t first = std::uint64_t{s} * h.slice_rows;
    float* const its_scales = scales == nullptr ? nullptr : scales + first;
    std::int32_t* const its_sums = sums == nullptr ? nullptr : sums + first;
    for (std::uint32_t i = 0; its_scales != nullptr && i < slice.rows(); ++i) {
      its_scales[i] = row_scale(slice.row(i), h.columns, levels);
    }
    for (std::uint32_t panel = 0; panel < h.panels; ++panel) {
      *units++ = static_cast<std::uint64_t>(end - out);
      end = units_of(format).pack(slice, h, panel, its_scales, its_sums, end);
    }
  }
  *units = static_cast<std::uint64_t>(end - out);
  std::memset(end, 0, kOverread);
  h.bytes = *units + kOverread;
  std::memcpy(out, &h, sizeof(h));
  return h.bytes;
}

void unpack(const Packed& packed, float* weights, std::uint8_t* mask) {
  const Header& h = packed.header;
  const std::uint64_t size = std::uint64_t{h.rows} * h.columns;
  std::memset(weights, 0, size * sizeof(float));
  if (mask != nullptr) std::memset(mask, 0, size);
  for (std::uint32_t slice = 0; slice < h.slices; ++slice) {
    for (std::uint32_t panel = 0; panel < h.panels; ++panel) {
      units_of(h.format).unpack(packed, slice, panel, weights, mask);
    }
  }
}

}  // namespace owl
