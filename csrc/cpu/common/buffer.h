// Working memory of a kernel.
#pragma once

#include "../../common/memory.h"
#include "simd.h"

namespace inr {
namespace INR_ISA {

INR_INLINE std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
INR_INLINE std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }
INR_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
INR_INLINE std::int64_t clamp(std::int64_t v, std::int64_t low, std::int64_t high) {
  return v < low ? low : v > high ? high : v;
}

// Aligned memory, zero-initialised if `zeros`; converts to false before resize and after a failed one.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t n, bool zeros = true) { resize(n, zeros); }
  ~Buffer() { deallocate(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  bool resize(std::int64_t n, bool zeros = true) {
    deallocate(data_, bytes_);
    bytes_ = std::size_t(round_up((n ? n : 1) * std::int64_t(sizeof(T)), vector_bytes));
    data_ = static_cast<T*>(allocate(bytes_));
    if (data_ && zeros) std::memset(static_cast<void*>(data_), 0, bytes_);
    return data_;
  }
  explicit operator bool() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace INR_ISA
}  // namespace inr
