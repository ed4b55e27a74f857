// Vectors of one machine register, in the compilers' portable vector extension.
//
// Every .cpp file under csrc/cpu is compiled once per instruction set, each time in its own namespace (INR_ISA), and
// dispatch.cpp chooses one at run time. Nothing under csrc/cpu may have external linkage outside that namespace: the
// linker keeps one copy of a shared inline function, which may use instructions that the processor does not have.
#pragma once

#if !defined(__GNUC__) || (!defined(__clang__) && __GNUC__ < 12)
#error "inr_kernels needs GCC 12 or later, or Clang 14 or later, for their vector extensions"
#endif

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INR_INLINE static inline __attribute__((always_inline))
// For long functions with several callers, and for those that are the same for several dtypes: one copy.
#define INR_NOINLINE __attribute__((noinline))

namespace inr {
namespace INR_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, registers = 32;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, registers = 32;
#else
constexpr int vector_bytes = 16, registers = 16;
#endif
// Rows of a matrix product's block, of two vectors each: 24 accumulators of 32 registers, or 12 of 16. Processors with
// four multiply-add units of four cycles (Neoverse V1, Apple M1) keep them busy with 16 accumulators or more.
constexpr int block_rows = registers == 32 ? 12 : 6;
// How many steps ahead of their use the weights of a product are prefetched. For small maps they come from the main
// memory, and the processor's own prefetching is late at the beginning of every block.
constexpr std::int64_t weights_ahead = 96;

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

// The type that a stored element is computed in, and the number of inner elements of one multiply-add.
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
template <>
struct Element<f16> {
  using Real = float;
  static constexpr int per_step = 1;
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
INR_INLINE std::uint32_t bits_of(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
INR_INLINE float float_of(std::uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
INR_INLINE float to_real(f16 v) {
  const std::uint32_t magnitude = std::uint32_t(v.bits & 0x7fff) << 13;
  const std::uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // infinity and NaN
  return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | std::uint32_t(v.bits & 0x8000) << 16);
}

INR_INLINE void from_real(float v, float* p) { *p = v; }
INR_INLINE void from_real(double v, double* p) { *p = v; }
INR_INLINE void from_real(float v, bf16* p) {  // to nearest even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  p->bits = v != v ? 0x7fc0 : std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INR_INLINE void from_real(float v, f16* p) {  // to nearest even
  const std::uint32_t bits = bits_of(v), magnitude = bits & 0x7fffffff;
  const std::uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const std::uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // rounded by the addition
  std::uint32_t half = magnitude < 0x38800000 ? small : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // from 65520 on
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  p->bits = std::uint16_t(half | (bits >> 16 & 0x8000));
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

typedef std::uint32_t Words __attribute__((vector_size(vector_bytes)));
typedef std::uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));

INR_INLINE Words load_halves(const void* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves);  // GCC 12 makes two vectors and joins them
#else
  return __builtin_convertvector(halves, Words);
#endif
}
INR_INLINE void store_halves(void* p, Words words) {
#if defined(__AVX512F__)
  const Halves halves = (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words);
#else
  const Halves halves = __builtin_convertvector(words, Halves);
#endif
  std::memcpy(p, &halves, sizeof halves);
}

// load and store of converted types: to_real and from_real for a whole vector.
INR_INLINE Vec<float> load(const bf16* p) { return (Vec<float>)(load_halves(p) << 16); }
INR_INLINE Vec<float> load(const f16* p) {
  const Words bits = load_halves(p), magnitude = (bits & 0x7fff) << 13;
  const Words special = (Words)(magnitude >= 0x0f800000) & 0x7f800000;
  return (Vec<float>)((Words)((Vec<float>)magnitude * 0x1p112f) | special | (bits & 0x8000) << 16);
}
INR_INLINE void store(bf16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
#else
  const Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_halves(p, v != v ? Words{} + 0x7fc0 : rounded);
#endif
}
INR_INLINE void store(f16* p, Vec<float> v) {
  const Words bits = (Words)v, magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const Words small = (Words)((Vec<float>)magnitude + 0.5f) - bits_of(0.5f);
  Words half = magnitude < 0x38800000 ? small : normal;
  half = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;
  store_halves(p, half | (bits >> 16 & 0x8000));
}

// The first n lanes, n < lanes<T>; load_part sets the others to zero. p: [n]
template <class T>
INR_INLINE Vec<T> load_part(const T* p, std::int64_t n) {
  Real<T> v[lanes<T>] = {};
  for (std::int64_t i = 0; i < n; ++i) v[i] = to_real(p[i]);
  return load(v);
}
template <class T>
INR_INLINE void store_part(T* p, Vec<T> v, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) from_real(v[i], p + i);
}
#if defined(__AVX512F__)
INR_INLINE Vec<float> load_part(const float* p, std::int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
INR_INLINE void store_part(float* p, Vec<float> v, std::int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
#endif

// Non-temporal stores, where available: they bypass the caches. p is aligned to vector_bytes. Call stream_fence before
// another thread reads.
INR_INLINE void stream_store(float* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#else
  store(p, v);
#endif
}
INR_INLINE void stream_store(double* p, Vec<double> v) {
#if defined(__AVX512F__)
  _mm512_stream_pd(p, (__m512d)v);
#else
  store(p, v);
#endif
}
INR_INLINE void stream_fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// e^x for x <= 0, accurate to 2 ulp; 0 where the result would be subnormal, NaN for NaN.
// x = n ln 2 + r, or x / ln 2 = n + f; adding `magic` rounds n to an integer and leaves it in the low bits.
INR_INLINE Vec<float> exp_negative(Vec<float> x) {
  const Vec<float> shifted = x * 0x1.715476p0f + 0x1.8p23f, n = shifted - 0x1.8p23f, f = x * 0x1.715476p0f - n;
  Vec<float> e = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;  // 2^f on [-1/2, 1/2] to 1e-7, exact at 0
  for (const float c : {0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.f}) e = e * f + c;
#if defined(__AVX512F__)
  e = (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)e, (__m512)n);
#else
  e *= (Vec<float>)(((Words)shifted << 23) + 0x3f800000u);
#endif
  return x < -87.f ? Vec<float>{} : e;
}
INR_INLINE Vec<double> exp_negative(Vec<double> x) {
  typedef std::uint64_t Word __attribute__((vector_size(vector_bytes)));
  const Vec<double> shifted = x * 1.4426950408889634 + 0x1.8p52, n = shifted - 0x1.8p52;
  const Vec<double> r = x - n * 0x1.62e42feep-1 - n * 1.90821492927058770002e-10;
  Vec<double> e = r * (1 / 6227020800.) + 1 / 479001600.;
  for (const double c : {1 / 39916800., 1 / 3628800., 1 / 362880., 1 / 40320., 1 / 5040., 1 / 720., 1 / 120., 1 / 24.,
                         1 / 6., 0.5, 1., 1.})
    e = e * r + c;
  e *= (Vec<double>)(((Word)shifted << 52) + 0x3ff0000000000000u);
  return x < -708. ? Vec<double>{} : e;
}

// (+-) pi^i / i!, the coefficients of the Taylor series of the sine (odd i) and the cosine (even i) of pi x.
struct PiSeries {
  double factor[20];
  constexpr PiSeries() : factor{1} {
    for (int i = 1; i < 20; ++i) factor[i] = factor[i - 1] * 3.14159265358979323846 / (i % 2 ? i : -i);
  }
};

// sin(pi x) and cos(pi x), accurate to 2^-23 (float64: 2^-52). The reduction to |r| <= 1 / 4 is exact: the argument is
// not rounded as a product pi * x is. Numbers beyond 2^20 (2^50) count as zero. Adding `magic` rounds to an integer.
template <class V>
INR_INLINE void sincos_pi(V x, V& sine, V& cosine) {
  constexpr bool single = sizeof(x[0]) == sizeof(float);
  using R = std::conditional_t<single, float, double>;
  constexpr R magic = single ? 0x1.8p23 : 0x1.8p52, limit = single ? 0x1p20 : 0x1p50;
  constexpr PiSeries series;
  constexpr int terms = single ? 5 : 9;
  x = ((x < limit) & (x > -limit)) ? x : x - x;  // infinity: NaN
  const V quarters = x * 2 + magic - magic, r = x - quarters * R(0.5), r2 = r * r;
  V s{}, c{};
#pragma GCC unroll 9
  for (int i = terms; i > 0; --i) {
    c = c * r2 + R(series.factor[2 * i]);
    if (i < terms) s = s * r2 + R(series.factor[2 * i + 1]);
  }
  constexpr double pi = series.factor[1];
  s = r * R(pi) + r * (s * r2 + R(pi - double(R(pi))));
  c = c * r2 + R(1);
  const V turn = quarters - (quarters * R(0.25) + magic - magic) * 4;  // -2, -1, 0, 1 or 2 quarters
  const V square = turn * turn;
  sine = square == 1 ? c : s;
  cosine = square == 1 ? s : c;
  sine = ((turn < 0) | (turn == 2)) ? -sine : sine;
  cosine = ((turn == 1) | (square == 4)) ? -cosine : cosine;
}

// max(v, 0) that propagates NaN.
template <class V>
INR_INLINE V relu(V v) {
  return v < 0 ? V{} : v;
}

}  // namespace INR_ISA
}  // namespace inr
