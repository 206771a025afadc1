// Uninitialized bytes, aligned for the kernels.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "format/format.h"

namespace owl {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes) { reserve(bytes); }

  // Only ever grows, and loses what it held when it does. Throws std::bad_alloc.
  std::byte* reserve(std::size_t bytes) {
    if (bytes > capacity_) {
      capacity_ = 0;
      data_.reset();
      data_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlignment})));
      capacity_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Release {
    void operator()(std::byte* data) const { ::operator delete(data, std::align_val_t{kAlignment}); }
  };

  std::unique_ptr<std::byte, Release> data_;
  std::size_t capacity_ = 0;
};

}  // namespace owl
