// What the shared library exports, beside ONNX Runtime's RegisterCustomOps (operator.cpp): the functions that
// owl_deploy/sparse/library.py calls through ctypes.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define OWL_EXPORT extern "C" __declspec(dllexport)
#else
#define OWL_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a function here changes.
inline constexpr int kOwlAbi = 4;

OWL_EXPORT int owl_abi();

// Comma-separated, best first: the instruction sets with kernels that this CPU can run.
OWL_EXPORT const char* owl_instruction_sets();

// Pack fp32 weights [rows, columns], row-major. With `out` null, returns the most bytes that a matrix of this shape can
// take; otherwise writes to `out` (aligned to 64, with a `capacity` of so many) and returns how many it took. -1: see
// owl_error().
OWL_EXPORT std::int64_t owl_pack(const float* weights, std::int64_t rows, std::int64_t columns, int format, int paired,
                                 std::uint8_t* out, std::int64_t capacity);

// 0 if the bytes are a sound packed matrix; -1: see owl_error().
OWL_EXPORT int owl_check(const std::uint8_t* data, std::int64_t size);

// Write the weights [rows, columns] as the kernels use them, and their mask (1: stored) if it is not null.
OWL_EXPORT int owl_unpack(const std::uint8_t* data, std::int64_t size, float* weights, std::uint8_t* mask);

// y [tokens, outputs] = x [tokens, columns] times the packed matrix, with the named kernels (null: the best) on
// `threads` threads of its own. `repeats` products are made, for benchmarks: returns the nanoseconds of all of them,
// or -1.
OWL_EXPORT std::int64_t owl_product(const std::uint8_t* data, std::int64_t size, const float* x, float* y,
                                    std::int64_t tokens, const char* kernels, int threads, int repeats);

// What went wrong in the calling thread's last call that failed.
OWL_EXPORT const char* owl_error();
