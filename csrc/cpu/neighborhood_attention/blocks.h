// Loops over blocks whose size is a compile-time constant, so that their sums stay in registers.
#pragma once

#include <type_traits>

#include "../common/simd.h"

namespace inr {
namespace INR_ISA {
namespace {

// Calls f with n, 1 ... Max, as a compile-time constant.
template <int Max, class F>
INR_INLINE void with_constant(std::int64_t n, F&& f) {
  if constexpr (Max > 0) {
    if (n == Max)
      f(std::integral_constant<int, Max>{});
    else
      with_constant<Max - 1>(n, f);
  }
}

// Divides [0, n) into as few blocks of at most Max as possible, of nearly equal sizes: calls f(begin, size), with the
// size as a compile-time constant.
template <int Max, class F>
INR_INLINE void in_blocks(std::int64_t n, F&& f) {
  std::int64_t blocks = (n + Max - 1) / Max;
  for (std::int64_t begin = 0, size; begin < n; begin += size, --blocks) {
    size = (n - begin + blocks - 1) / blocks;
    with_constant<Max>(size, [&](auto Size) { f(begin, Size); });
  }
}

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
