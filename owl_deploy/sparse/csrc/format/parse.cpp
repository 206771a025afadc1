#include <bit>
#include <cmath>
#include <cstring>

#include "format/format.h"
#include "format/layout.h"
#include "format/units.h"

static_assert(std::endian::native == std::endian::little, "packed matrices are little-endian");

namespace owl {
namespace {

template <class F>
const char* check_shape(const Header& h) {
  if (h.rows == 0 || h.columns == 0 || h.rows > kMaxSize || h.columns > kMaxSize) return "impossible shape";
  if (h.paired > 1 || (h.paired && h.rows % 2 != 0)) return "impossible pairing of rows";
  if (h.slice_rows == 0 || h.slice_rows > kMaxRows || h.slice_rows % kLanes != 0) return "impossible slices";
  const std::uint32_t halves = h.paired ? 2 : 1;
  if (h.slices != ceil_div(h.rows / halves, h.slice_rows / halves)) return "impossible slices";
  if (h.panel_columns == 0 || h.panel_columns % F::kColumns != 0) return "impossible panels";
  if (h.panel_columns > padded_columns<F>(h)) return "impossible panels";  // near 2^32, ceil_div would give 0 of them
  if (h.panels != ceil_div(h.columns, h.panel_columns)) return "impossible panels";
  if (!F::kPanels && h.panels != 1) return "impossible panels";
  return nullptr;
}

const char* check_header(const Header& h, std::size_t size) {
  if (h.magic != kMagic) return "not a packed matrix (wrong magic number)";
  if (h.version != kVersion) return "packed by another version of owl-deploy; export the model again";
  if (!is_format(static_cast<int>(h.format))) return "unknown weight format";
  if (h.bytes != size) return "truncated, or longer than its header says";
  return with_format(h.format, [&](auto f) { return check_shape<decltype(f)>(h); });
}

// The bytes [offset, offset + length) lie after the header and before the end, at a multiple of 64.
bool lies_within(const Header& h, std::uint64_t offset, std::uint64_t length) {
  return offset % kAlignment == 0 && offset >= sizeof(Header) && offset <= h.bytes && length <= h.bytes - offset;
}

}  // namespace

const char* parse(const std::uint8_t* data, std::size_t size, Packed& packed) {
  if (reinterpret_cast<std::uintptr_t>(data) % kAlignment != 0) return "packed matrix is not aligned to 64 bytes";
  if (size < sizeof(Header)) return "truncated: shorter than a header";
  Header h;
  std::memcpy(&h, data, sizeof(h));
  if (const char* problem = check_header(h, size)) return problem;

  const std::uint64_t count = std::uint64_t{h.slices} * h.panels;
  if (!lies_within(h, sizeof(Header), (count + 1) * sizeof(std::uint64_t))) return "truncated: no room for its units";
  const bool scaled = with_format(h.format, [](auto f) { return f.kLevels != 0; });
  const bool summed = with_format(h.format, [](auto f) { return f.kSums; });
  if (scaled && !lies_within(h, h.scales, std::uint64_t{h.rows} * sizeof(float))) return "its scales are out of range";
  if (summed && !lies_within(h, h.sums, std::uint64_t{h.rows} * sizeof(float))) return "its sums are out of range";
  const auto* table = reinterpret_cast<const std::uint64_t*>(data + sizeof(Header));
  packed = {h, std::vector<std::uint64_t>(table, table + count + 1), data,
            scaled ? reinterpret_cast<const float*>(data + h.scales) : nullptr,
            summed ? reinterpret_cast<const std::int32_t*>(data + h.sums) : nullptr};
  for (std::uint32_t row = 0; scaled && row < h.rows; ++row) {
    if (!std::isfinite(packed.scales[row])) return "a scale is not finite";
  }
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t begin = packed.units[i], end = packed.units[i + 1];
    if (end < begin || !lies_within(h, begin, end - begin)) return "a unit is out of range";
    const auto slice = static_cast<std::uint32_t>(i / h.panels), panel = static_cast<std::uint32_t>(i % h.panels);
    if (const char* problem = units_of(h.format).check(h, unit_of(packed, slice, panel), slice, panel)) return problem;
  }
  if (packed.units[count] > h.bytes - kOverread) return "truncated: no room after its last unit";
  return nullptr;
}

}  // namespace owl
