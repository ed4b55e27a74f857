// Winograd's transforms at the points 0, 1, -1 and infinity, shared by the convolutions with 3 x 3 kernels.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace inr {
namespace INR_ISA {

INR_INLINE std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// Replaces (v0, v1, v2, v3) by B^T v.
template <class V>
INR_INLINE void transform_inputs(V& v0, V& v1, V& v2, V& v3) {
  const V a = v0 - v2, b = v1 + v2, c = v2 - v1, d = v1 - v3;
  v0 = a, v1 = b, v2 = c, v3 = d;
}

// A value of each output in a block, in whole vectors.
template <class T>
using Rows = T[(block_rows + lanes<T> - 1) / lanes<T> * lanes<T>];

// A stride of at least n, for which several points fall into different cache sets.
template <class T>
INR_INLINE std::int64_t point_stride(std::int64_t n) {
  constexpr std::int64_t step = 64 * lanes<T>;
  return (n + step - 1) / step * step + lanes<T>;
}

// The index in [0, n) of the value that the padding, one pixel wide, puts at index v; -1 for zero. Values past n are not
// used.
INR_INLINE std::int64_t source_index(Padding padding, std::int64_t v, std::int64_t n) {
  if (v >= 0 && v < n) return v;
  if (padding == Padding::zeros || v > n) return -1;
  return v < 0 ? -v : 2 * (n - 1) - v;
}

}  // namespace INR_ISA
}  // namespace inr
