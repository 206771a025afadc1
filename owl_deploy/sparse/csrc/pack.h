// Dense weights to packed ones, and back.
#pragma once

#include <vector>

#include "format.h"

namespace owl {

// What `pack` needs to know: where everything goes.
struct Layout {
  Header header;
  std::vector<std::uint64_t> units;  // offset of each, and the end of the last
};

// Most bytes that weights of such a shape can take, packed; 0 and `problem` set if the shape is out of range, or the rows
// are paired and odd.
std::uint64_t most_bytes(std::uint64_t rows, std::uint64_t columns, Format format, bool paired, const char*& problem);

// Arrange fp32 weights [rows, columns], row-major, of a shape that `most_bytes` has nothing against. `problem` is set if
// one is not finite.
Layout layout_of(const float* weights, std::uint64_t rows, std::uint64_t columns, Format format, bool paired,
                 const char*& problem);

// Write `layout.header.bytes` bytes to `out`. Same weights, same bytes.
void pack(const float* weights, const Layout& layout, std::uint8_t* out);

// The weights as the kernels use them, and which are stored (mask may be null); both [rows, columns].
void unpack(const Packed& packed, float* weights, std::uint8_t* mask);

}  // namespace owl
