// Memory that a kernel works in.
#pragma once

#include <cstdlib>

#include "simd.h"

namespace inr {
namespace INR_ISA {

INR_INLINE std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
INR_INLINE std::int64_t clamp(std::int64_t v, std::int64_t low, std::int64_t high) {
  return v < low ? low : v > high ? high : v;
}

// Zeroed, aligned memory; false before resize and when there is none.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t n) { resize(n); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  bool resize(std::int64_t n) {
    std::free(data_);
    const std::size_t bytes = std::size_t(round_up((n ? n : 1) * std::int64_t(sizeof(T)), vector_bytes));
    data_ = static_cast<T*>(std::aligned_alloc(vector_bytes, bytes));
    if (data_) std::memset(static_cast<void*>(data_), 0, bytes);
    return data_;
  }
  explicit operator bool() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace INR_ISA
}  // namespace inr
