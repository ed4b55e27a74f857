// A micro-kernel whose rows of B are anywhere: sums over the taps of a convolution.
#pragma once

#include "buffer.h"

namespace inr {
namespace INR_ISA {

// sums[r][v] = sum over k < steps of a[k][r] * vector v of b[offsets[k]]. a: [steps][R]
// Long sums are split into runs, so that rounding errors do not grow with the number of steps.
template <class T, int R, int V>
INR_INLINE void accumulate(std::int64_t steps, const T* a, const T* b, const std::int64_t* offsets,
                           Vec<T> (&sums)[R][V]) {
  constexpr std::int64_t run = 64;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = Vec<T>{};
  for (std::int64_t begin = 0; begin < steps; begin += run) {
    Vec<T> acc[R][V] = {};
    const std::int64_t end = smaller(begin + run, steps);
    for (std::int64_t k = begin; k < end; ++k, a += R) {
      const T* from = b + offsets[k];
      __builtin_prefetch(a + weights_ahead * R);
      Vec<T> bv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) bv[v] = load(from + v * lanes<T>);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += a[r] * bv[v];
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += acc[r][v];
  }
}

}  // namespace INR_ISA
}  // namespace inr
