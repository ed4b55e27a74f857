// Shared by the kernels of elementwise_filter: loads and stores of four pixels, logits, paddings, the sum of the terms.
//
// Four values of a plane are one load of 16 bytes (8 in half precision) where they are aligned.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace inr {
namespace cuda {

constexpr int pixels = 4;  // of a thread, adjacent in a row

template <Type type>
struct Stored {
  using Value = std::uint16_t;
  using Four = uint2;
  static __device__ __forceinline__ float load(const Value* from) { return unpack<type>(*from).x; }
  static __device__ __forceinline__ void store(float v, Value* to) { *to = Value(pack<type>(v, 0)); }
  static __device__ __forceinline__ void load(const Four* from, float (&v)[pixels]) {
    const Four pairs = *from;
    const float2 low = unpack<type>(pairs.x), high = unpack<type>(pairs.y);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
  }
  static __device__ __forceinline__ void store(const float (&v)[pixels], Four* to) {
    *to = {pack<type>(v[0], v[1]), pack<type>(v[2], v[3])};
  }
};
template <>
struct Stored<Type::float32> {
  using Value = float;
  using Four = float4;
  static __device__ __forceinline__ float load(const Value* from) { return *from; }
  static __device__ __forceinline__ void store(float v, Value* to) { *to = v; }
  static __device__ __forceinline__ void load(const Four* from, float (&v)[pixels]) {
    const Four four = *from;
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  }
  static __device__ __forceinline__ void store(const float (&v)[pixels], Four* to) { *to = {v[0], v[1], v[2], v[3]}; }
};

// An operand whose rows can be read or written four values at a time.
template <Type type>
struct Plane4 {
  typename Stored<type>::Value* data;
  bool vectors;  // whether every fourth value of every row is aligned

  // The first `count` values of `from`, with a step in elements; zeros after them. whole: `count` is 4 or 0, and
  // rows are aligned.
  template <bool whole = false>
  __device__ __forceinline__ void load(std::int64_t from, std::int64_t step, int count, float (&v)[pixels]) const {
    using S = Stored<type>;
    if ((whole || vectors) && count >= pixels)
      return S::load(reinterpret_cast<const typename S::Four*>(data + from), v);
#pragma unroll
    for (int i = 0; i < pixels; ++i) v[i] = !whole && i < count ? S::load(data + from + i * step) : 0;
  }
  template <bool whole = false>
  __device__ __forceinline__ void store(const float (&v)[pixels], std::int64_t to, int count) const {
    using S = Stored<type>;
    if ((whole || vectors) && count >= pixels) return S::store(v, reinterpret_cast<typename S::Four*>(data + to));
#pragma unroll
    for (int i = 0; i < pixels; ++i)
      if (!whole && i < count) S::store(v[i], data + to + i);
  }
};

// The index in [0, n) whose value the padding puts at index i; -1 for zero.
__device__ __forceinline__ int padded_index(Padding padding, int i, int n) {
  if (i >= 0 && i < n) return i;
  if (padding == Padding::replicate) return i < 0 ? 0 : n - 1;
  if (padding == Padding::reflect) return i < 0 ? -i : 2 * (n - 1) - i;
  return -1;
}

__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * 1.4426950408889634f); }

// Replaces the first `count` of a pixel's logits by their softmax times its sum; returns the inverse of the sum.
template <int T>
__device__ __forceinline__ float exponentials(float (&v)[T][pixels], int i, int count = T) {
  float most = v[0][i], total = 0;
#pragma unroll
  for (int t = 1; t < T; ++t)
    if (t < count) most = fmaxf(most, v[t][i]);
#pragma unroll
  for (int t = 0; t < T; ++t)
    if (t < count) total += v[t][i] = exp_fast(v[t][i] - most);
  return 1 / total;
}

// Whether all of these offsets, in elements, and the address are multiples of four values.
template <Type type>
bool all_aligned(const void* data, std::int64_t offsets) {
  return offsets % pixels == 0 && reinterpret_cast<std::uintptr_t>(data) % (pixels * bytes_of(type)) == 0;
}

// An operand of rows of `width` values, without gaps.
template <Type type>
Plane4<type> plane(const void* data, std::int64_t width) {
  return {static_cast<typename Stored<type>::Value*>(const_cast<void*>(data)), all_aligned<type>(data, width)};
}

// The op's kernel: a logit, or a weight, of every tap of every output pixel of a group.
template <Type type>
struct Logits {
  Plane4<type> values;
  std::int64_t strides[4];
  const float* log_window;  // [taps] or nullptr
  int taps;

  Logits(const ElementwiseFilter& p, const float* log_window)
      : values(plane<type>(p.kernel, p.kernel_strides[0] | p.kernel_strides[1] | p.kernel_strides[2])),
        log_window(log_window), taps(int(p.taps())) {
    for (int axis = 0; axis < 4; ++axis) strides[axis] = p.kernel_strides[axis];
    values.vectors &= strides[3] == 1;
  }
  // The place of a group's first tap at the output pixel (y, x).
  __device__ __forceinline__ std::int64_t place(std::int64_t image, std::int64_t group, int y, int x) const {
    return image * strides[0] + group * taps * strides[1] + y * strides[2] + x * strides[3];
  }
  // Of a tap, for `count` pixels from a place on; after them zeros, to which the window is added, too.
  template <bool whole = false>
  __device__ __forceinline__ void load(std::int64_t place, int tap, int count, float (&v)[pixels]) const {
    values.template load<whole>(place + tap * strides[1], strides[3], count, v);
    if (!log_window) return;
#pragma unroll
    for (int i = 0; i < pixels; ++i) v[i] += log_window[tap];
  }
};

// The factors of the op's terms.
struct Terms {
  float alpha, beta, gamma;

  explicit Terms(const ElementwiseFilter& p) : alpha(float(p.alpha)), beta(float(p.beta)), gamma(float(p.gamma)) {}
  // The sum of the terms; a factor of 0 omits its own, which may be infinite or NaN.
  __device__ __forceinline__ float sum(float centre, float box, float filtered) const {
    float v = gamma != 0 ? gamma * filtered : 0;
    if (beta != 0) v = fmaf(beta, box, v);
    return alpha != 0 ? fmaf(alpha, centre, v) : v;
  }
};

// What the forward and the backward know of a call.
template <Type type>
struct Problem {
  Plane4<type> x;  // [batch, channels, height, width]
  Logits<type> logits;
  Terms terms;
  int height, width, out_height, out_width;
  int groups, channels;  // channels of a group
  int kernel_height, kernel_width;
  Padding padding;
  bool softmax;

  Problem(const ElementwiseFilter& p, const float* log_window)
      : x(plane<type>(p.x, p.width)), logits(p, log_window), terms(p), height(int(p.height)), width(int(p.width)),
        out_height(int(p.out_height)), out_width(int(p.out_width)), groups(int(p.groups)),
        channels(int(p.channels / p.groups)), kernel_height(int(p.kernel_height)), kernel_width(int(p.kernel_width)),
        padding(p.padding), softmax(p.normalize == Normalize::taps) {}
};

// A grid of a row of blocks. CUDA refuses one of 2^31 blocks; more would lose their high bits.
inline dim3 row_of(std::int64_t blocks) { return dim3(unsigned(std::min(blocks, std::int64_t(1) << 31))); }

}  // namespace cuda
}  // namespace inr
