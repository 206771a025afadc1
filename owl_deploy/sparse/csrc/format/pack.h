// Dense weights to packed ones, and back.
#pragma once

#include "format/format.h"

namespace owl {

// Most bytes that weights of such a shape can take, packed; 0 and `problem` set if the shape is out of range, or the
// rows are paired and odd.
std::uint64_t most_bytes(std::uint64_t rows, std::uint64_t columns, Format format, bool paired, const char*& problem);

// Pack fp32 weights [rows, columns], row-major, of a shape that `most_bytes` has nothing against, into `out`, which
// lies at a multiple of 64 and has room for so many. Returns how many it took; 0 and `problem` set if a weight is not
// finite. Same weights, same bytes.
std::uint64_t pack(const float* weights, std::uint64_t rows, std::uint64_t columns, Format format, bool paired,
                   std::uint8_t* out, const char*& problem);

// The weights as the kernels use them, and which are stored (mask may be null); both [rows, columns].
void unpack(const Packed& packed, float* weights, std::uint8_t* mask);

}  // namespace owl
