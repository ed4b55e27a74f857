// Vectors of one machine register, in the compilers' portable vector extension.
//
// Every file of csrc/cpu is compiled once per instruction set, each time in a namespace of its own
// (INR_ISA), and dispatch.cpp picks one when it runs. So nothing here may have external linkage
// outside that namespace: a shared inline function would end up in whichever build the linker saw first.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define INR_INLINE static inline __attribute__((always_inline))

namespace inr {
namespace INR_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int block_rows = 12;  // 12 x 2 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
constexpr int block_rows = 6;  // 6 x 2 accumulators of 16 registers
#else
constexpr int vector_bytes = 16;
constexpr int block_rows = 6;
#endif

struct bf16 {
  std::uint16_t bits;
};

// What a stored element is computed in, and how many elements one multiply-add takes at a time.
template <class Stored>
struct Element {
  using Real = Stored;
  static constexpr int per_step = 1;
};
template <>
struct Element<bf16> {
  using Real = float;
  static constexpr int per_step = 2;  // vdpbf16ps: a pair along the inner dimension
};

template <class Stored>
using Real = typename Element<Stored>::Real;
template <class Stored>
constexpr int lanes = vector_bytes / int(sizeof(Real<Stored>));

template <class R>
struct VectorOf {
  typedef R type __attribute__((vector_size(vector_bytes)));
};
template <class Stored>
using Vec = typename VectorOf<Real<Stored>>::type;

INR_INLINE float to_real(float v) { return v; }
INR_INLINE double to_real(double v) { return v; }
INR_INLINE float to_real(bf16 v) {
  const std::uint32_t bits = std::uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

INR_INLINE void from_real(float v, float* p) { *p = v; }
INR_INLINE void from_real(double v, double* p) { *p = v; }
INR_INLINE void from_real(float v, bf16* p) {  // to nearest even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  p->bits = v != v ? 0x7fc0 : std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
INR_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
INR_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

#if defined(__AVX512BF16__)
INR_INLINE Vec<float> load(const bf16* p) {
  typedef std::uint16_t Half __attribute__((vector_size(vector_bytes / 2)));
  typedef std::uint32_t Word __attribute__((vector_size(vector_bytes)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, Word) << 16);
}
INR_INLINE void store(bf16* p, Vec<float> v) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
}
#endif

// max(v, 0) that hands a NaN on.
template <class V>
INR_INLINE V relu(V v) {
  return v < 0 ? V{} : v;
}

}  // namespace INR_ISA
}  // namespace inr
