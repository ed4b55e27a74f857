// Winograd's transforms, shared by the convolutions with 3 x 3 kernels.
//
// 2 outputs along an axis, from 4 inputs, at the points 0, 1, -1 and infinity:
//
//   B^T = 1  0 -1  0      G = 1    0    0       A^T = 1  1  1  0
//         0  1  1  0          1/2  1/2  1/2           0  1 -1 -1
//         0 -1  1  0          1/2 -1/2  1/2
//         0  1  0 -1          0    0    1
//
// 4 outputs, from 6 inputs, at the points 0, a, -a, b, -b and infinity, a = 5/8 and b = 3/2. Of the pairs of points that
// float32 has exactly, it has about the smallest rounding errors: half of those of the points 1 and 2.
//
//   B^T = aabb  0     -aa-bb  0       1  0      G = 1/n  0     0          A^T = 1  1    1    1    1    0
//         0    -abb   -bb     a       1  0          1/p  a/p   aa/p             0  a   -a    b   -b    0
//         0     abb   -bb    -a       1  0          1/p -a/p   aa/p             0  aa   aa   bb   bb   0
//         0    -aab   -aa     b       1  0          1/q  b/q   bb/q             0  aaa -aaa  bbb -bbb  1
//         0     aab   -aa    -b       1  0          1/q -b/q   bb/q
//         0     aabb   0     -aa-bb   0  1          0    0     1
//
// with n = aabb, p = 2 aa (aa - bb), q = 2 bb (bb - aa)
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/simd.h"

namespace inr {
namespace INR_ISA {

template <class V>
using Scalar = std::decay_t<decltype(V{}[0])>;

// A value of each output in a block, in whole vectors.
template <class T>
using Rows = T[(block_rows + lanes<T> - 1) / lanes<T> * lanes<T>];

constexpr double point_a = 0.625, point_b = 1.5, square_a = point_a * point_a, square_b = point_b * point_b;

// B^T v, in place.
template <class V>
INR_INLINE void transform_inputs(V (&v)[4]) {
  const V a = v[0] - v[2], b = v[1] + v[2], c = v[2] - v[1], d = v[1] - v[3];
  v[0] = a, v[1] = b, v[2] = c, v[3] = d;
}
template <class V>
INR_INLINE void transform_inputs(V (&v)[6]) {
  using T = Scalar<V>;
  constexpr T aa = T(square_a), bb = T(square_b);
  const V first = v[4] - v[2] * (aa + bb) + v[0] * (aa * bb), last = v[5] - v[3] * (aa + bb) + v[1] * (aa * bb);
  const V even_a = v[4] - v[2] * bb, odd_a = v[3] - v[1] * bb, even_b = v[4] - v[2] * aa, odd_b = v[3] - v[1] * aa;
  v[0] = first, v[5] = last;
  v[1] = even_a + odd_a * T(point_a), v[2] = even_a - odd_a * T(point_a);
  v[3] = even_b + odd_b * T(point_b), v[4] = even_b - odd_b * T(point_b);
}

// A^T m.
template <class V>
INR_INLINE void transform_products(const V (&m)[4], V (&to)[2]) {
  to[0] = m[0] + m[1] + m[2];
  to[1] = m[1] - m[2] - m[3];
}
template <class V>
INR_INLINE void transform_products(const V (&m)[6], V (&to)[4]) {
  using T = Scalar<V>;
  constexpr T a = T(point_a), b = T(point_b), aa = T(square_a), bb = T(square_b);
  const V sum_a = m[1] + m[2], sum_b = m[3] + m[4], odd_a = (m[1] - m[2]) * a, odd_b = (m[3] - m[4]) * b;
  to[0] = m[0] + sum_a + sum_b;
  to[1] = odd_a + odd_b;
  to[2] = sum_a * aa + sum_b * bb;
  to[3] = m[5] + odd_a * aa + odd_b * bb;
}

// A e.
template <class V>
INR_INLINE void transform_outputs_gradient(const V (&e)[4], V (&to)[6]) {
  using T = Scalar<V>;
  constexpr T a = T(point_a), b = T(point_b), aa = T(square_a), bb = T(square_b);
  const V even_a = e[0] + e[2] * aa, odd_a = (e[1] + e[3] * aa) * a;
  const V even_b = e[0] + e[2] * bb, odd_b = (e[1] + e[3] * bb) * b;
  to[0] = e[0], to[5] = e[3];
  to[1] = even_a + odd_a, to[2] = even_a - odd_a;
  to[3] = even_b + odd_b, to[4] = even_b - odd_b;
}

constexpr double scale_n = square_a * square_b, scale_p = 2 * square_a * (square_a - square_b),
                 scale_q = 2 * square_b * (square_b - square_a);

// G^T m.
template <class V>
INR_INLINE void transform_sums(const V (&m)[4], V (&to)[3]) {
  using T = Scalar<V>;
  const V even = (m[1] + m[2]) * T(0.5);
  to[0] = m[0] + even, to[1] = (m[1] - m[2]) * T(0.5), to[2] = even + m[3];
}
template <class V>
INR_INLINE void transform_sums(const V (&m)[6], V (&to)[3]) {
  using T = Scalar<V>;
  const V even_a = (m[1] + m[2]) * T(1 / scale_p), even_b = (m[3] + m[4]) * T(1 / scale_q);
  to[0] = m[0] * T(1 / scale_n) + even_a + even_b;
  to[1] = (m[1] - m[2]) * T(point_a / scale_p) + (m[3] - m[4]) * T(point_b / scale_q);
  to[2] = even_a * T(square_a) + even_b * T(square_b) + m[5];
}

// G g of the kernel's elements g0, g1, g2 along an axis, for a block of outputs.
template <class T>
INR_INLINE void transform_kernel(const Rows<T>& g0, const Rows<T>& g1, const Rows<T>& g2, Rows<T> (&to)[4]) {
  for (int r = 0; r < block_rows; r += lanes<T>) {
    const Vec<T> first = load(g0 + r), last = load(g2 + r);
    const Vec<T> sum = (first + last) * T(0.5), middle = load(g1 + r) * T(0.5);
    store(to[0] + r, first);
    store(to[1] + r, sum + middle);
    store(to[2] + r, sum - middle);
    store(to[3] + r, last);
  }
}
template <class T>
INR_INLINE void transform_kernel(const Rows<T>& g0, const Rows<T>& g1, const Rows<T>& g2, Rows<T> (&to)[6]) {
  for (int r = 0; r < block_rows; r += lanes<T>) {
    const Vec<T> first = load(g0 + r), middle = load(g1 + r), last = load(g2 + r);
    const auto store_pair = [&](Rows<T>* pair, double point, double scale) {
      const Vec<T> even = first * T(1 / scale) + last * T(point * point / scale), odd = middle * T(point / scale);
      store(pair[0] + r, even + odd);
      store(pair[1] + r, even - odd);
    };
    store(to[0] + r, first * T(1 / scale_n));
    store_pair(to + 1, point_a, scale_p);
    store_pair(to + 3, point_b, scale_q);
    store(to[5] + r, last);
  }
}

}  // namespace INR_ISA
}  // namespace inr
