// Dense weights to packed ones, and back.
#pragma once

#include "format.h"

namespace owl {

// Bytes that `pack` will write for fp32 weights [rows, columns], row-major; 0 and `problem` set if they cannot be
// packed (a shape out of range, an odd number of paired rows, a weight that is not finite).
std::uint64_t packed_bytes(const float* weights, std::uint64_t rows, std::uint64_t columns, Format format, bool paired,
                           const char*& problem);

// Write that many bytes to `out`. Same weights, same bytes.
void pack(const float* weights, std::uint64_t rows, std::uint64_t columns, Format format, bool paired,
          std::uint8_t* out);

// The weights as the kernels use them, and which are stored (mask may be null); both [rows, columns].
void unpack(const Packed& packed, float* weights, std::uint8_t* mask);

}  // namespace owl
