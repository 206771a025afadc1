// The packed weight formats. FORMAT.md, two folders up, is the specification; this folder is its C++ side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace owl {

enum class Format : std::uint8_t {
  packed32 = 1,  // fp32 weights, column index in the 5 low mantissa bits
  packed16 = 2,  // 11-bit weights, column index in the 5 bits below
  int8 = 3,      // 8-bit weights after a bit mask
  dense8 = 4,    // 8-bit weights, all of them
  int4 = 5,      // 4-bit weights after bit masks
  dense4 = 6,    // 4-bit weights, all of them
};

inline constexpr std::uint32_t kMagic = 0x4B4C574F;  // "OWLK" in little-endian order
inline constexpr std::uint16_t kVersion = 1;
inline constexpr std::size_t kAlignment = 64;       // bytes, of every section
inline constexpr std::uint32_t kLanes = 16;         // rows in a group
inline constexpr std::uint32_t kMaxRows = 256;      // of a slice: positions in it are bytes
inline constexpr std::uint32_t kMaxSize = 1 << 24;  // rows or columns of a matrix

struct Header {
  std::uint32_t magic;
  std::uint16_t version;
  Format format;
  std::uint8_t paired;  // 1: rows are gate and up halves, and the product is silu(gate) * up
  std::uint32_t rows;
  std::uint32_t columns;
  std::uint32_t slice_rows;
  std::uint32_t slices;
  std::uint32_t panel_columns;
  std::uint32_t panels;
  std::uint64_t nonzeros;
  std::uint64_t bytes;   // of all of it, this header included
  std::uint64_t scales;  // offset of float[rows], or 0
  std::uint64_t sums;    // offset of int32[rows], or 0
};
static_assert(sizeof(Header) == 64);

// A packed matrix that `parse` checked. Its bytes may lie in a mapped file that someone rewrites later, so the header
// and the table are copies, and whoever follows step counts, positions or masks stays between `data` and its end
// whatever they have become.
struct Packed {
  Header header;
  std::vector<std::uint64_t> units;  // offsets of [slices * panels] units, and the end of the last
  const std::uint8_t* data;
  const float* scales;
  const std::int32_t* sums;
};

// The bytes of one unit.
struct Unit {
  const std::uint8_t* begin;
  const std::uint8_t* end;
};

// Check `size` bytes at `data`, which need an alignment of 64. Returns null and fills `packed`, or says what is
// wrong. Reads nothing outside of the bytes, whatever they are. Throws std::bad_alloc.
const char* parse(const std::uint8_t* data, std::size_t size, Packed& packed);

}  // namespace owl
