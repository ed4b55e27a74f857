// C = A B on row-major tiles that stay in the caches.
//
// The micro-kernel holds block_rows x 2 vectors of C in registers and loops over the inner dimension; on Zen 4 it runs
// at the peak rate of the multiply-add units. A is broadcast element by element; B is loaded as vectors, either from
// packed panels (weights) or from plain rows (activations).
#pragma once

#include "buffer.h"
#include "tile_product.h"

namespace inr {
namespace INR_ISA {

template <class T>
constexpr int panel = 2 * lanes<T>;  // columns of C per full panel
constexpr std::int64_t longest_run = 320;

// Row stride of an activation tile of `n` columns: whole panels, plus a vector so that consecutive rows fall into
// different cache sets and a block of block_rows columns may start at any of the n.
template <class T>
INR_INLINE std::int64_t row_stride(std::int64_t n) {
  constexpr int vector = vector_bytes / int(sizeof(T));
  return round_up(n, panel<T> * Element<T>::per_step) + (vector < block_rows ? block_rows : vector);
}

// One multiply-add acc += a * b over per_step inner elements. a: [per_step] of one row of A; b: [lanes][per_step]
template <class T>
struct MultiplyAdd {
  INR_INLINE Vec<T> vector(const T* b) { return load(b); }
  INR_INLINE void add(Vec<T>& acc, const T* a, Vec<T> b) { acc += *a * b; }
};
#if defined(__AVX512BF16__)
template <>
struct MultiplyAdd<bf16> {
  INR_INLINE __m512bh vector(const bf16* b) { return (__m512bh)_mm512_loadu_si512(b); }
  INR_INLINE void add(Vec<bf16>& acc, const bf16* a, __m512bh b) {
    int pair;
    std::memcpy(&pair, a, sizeof pair);
    acc = (Vec<bf16>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), b);
  }
};
#endif

// acc[i][v] = sum over k < steps of a[i * row + k * col] * vector v of b[k * b_row].
// a: [block_rows, steps] with strides row, col; b: [steps, NV vectors] with row stride b_row; each step is per_step
// inner elements.
template <class T, int NV>
INR_INLINE void micro_kernel(std::int64_t steps, const T* a, std::int64_t row, std::int64_t col, const T* b,
                             std::int64_t b_row, Vec<T> (&acc)[block_rows][NV]) {
  static_assert(block_rows % 3 == 0 && block_rows <= 12, "four row pointers, three rows each");
#pragma GCC unroll 12
  for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<T>{};
  // x86 addresses reach p, p + r and p + 2r from two registers: four pointers serve twelve rows.
  const T *a0 = a, *a1 = a + 3 * row, *a2 = a + 6 * row, *a3 = a + 9 * row;
  for (std::int64_t k = 0; k < steps; ++k) {
    decltype(MultiplyAdd<T>::vector(b)) bv[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) bv[v] = MultiplyAdd<T>::vector(b + v * lanes<T> * Element<T>::per_step);
#pragma GCC unroll 12
    for (int i = 0; i < block_rows; ++i) {
      const T* a_i = (i < 3 ? a0 : i < 6 ? a1 : i < 9 ? a2 : a3) + (i % 3) * row;
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) MultiplyAdd<T>::add(acc[i][v], a_i, bv[v]);
    }
    a0 += col, a1 += col, a2 += col, a3 += col;
    b += b_row;
  }
}

// The same, in runs of steps whose sums are added, so that rounding errors do not grow with the number of steps.
template <class T, int NV>
INR_NOINLINE static void sum_of_runs(std::int64_t run, std::int64_t steps, const T* a, std::int64_t row,
                                     std::int64_t col, const T* b, std::int64_t b_row,
                                     Vec<T> (&sums)[block_rows][NV]) {
  for (std::int64_t k = 0; k < steps; k += run) {
    Vec<T> acc[block_rows][NV];
    const std::int64_t count = steps - k < run ? steps - k : run;
    micro_kernel<T, NV>(count, a + k * col, row, col, b + k * b_row, b_row, acc);
#pragma GCC unroll 12
    for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sums[i][v] = k ? sums[i][v] + acc[i][v] : acc[i][v];
  }
}

// Calls emit(r, v, vector) for the rows and vectors of a block of C.
template <int NV, class T, class Emit>
INR_INLINE void emit_block(const Vec<T> (&acc)[block_rows][NV], Emit& emit) {
#pragma GCC unroll 12
  for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) emit(r, v, acc[r][v]);
}

// The same for the block of a and b, in runs of at most `run` steps.
template <class T, int NV, class Emit>
INR_INLINE void multiply_block(std::int64_t run, std::int64_t steps, const T* a, std::int64_t row, std::int64_t col,
                               const T* b, std::int64_t b_row, Emit emit) {
  if (steps <= run) {
    Vec<T> acc[block_rows][NV];
    micro_kernel<T, NV>(steps, a, row, col, b, b_row, acc);
    emit_block<NV, T>(acc, emit);
  } else {
    Vec<T> sums[block_rows][NV];
    sum_of_runs<T, NV>(run, steps, a, row, col, b, b_row, sums);
    emit_block<NV, T>(sums, emit);
  }
}

// Calls emit(i, j, vector) for the elements C[i][j ... j + lanes) of C = A B, for i < round_up(rows, block_rows) and
// j < round_up(cols, lanes). a: [round_up(rows, block_rows), steps] with strides a_row, a_col; b: panels of columns,
// b_panel apart, each [steps, panel] with row stride b_row; run: the most steps that are added one after the other.
template <class T, class Emit>
INR_INLINE void gemm(std::int64_t rows, std::int64_t cols, std::int64_t steps, const T* a, std::int64_t a_row,
                     std::int64_t a_col, const T* b, std::int64_t b_row, std::int64_t b_panel, Emit emit,
                     std::int64_t run = longest_run) {
  for (std::int64_t i = 0; i < rows; i += block_rows) {
    for (std::int64_t j = 0; j < cols; j += panel<T>) {
      const T *a_block = a + i * a_row, *b_block = b + j / panel<T> * b_panel;
      const auto emit_at = [&](int r, int v, Vec<T> c) { emit(i + r, j + v * lanes<T>, c); };
      if (cols - j > lanes<T>)
        multiply_block<T, 2>(run, steps, a_block, a_row, a_col, b_block, b_row, emit_at);
      else
        multiply_block<T, 1>(run, steps, a_block, a_row, a_col, b_block, b_row, emit_at);
    }
  }
}

// A matrix in panels of columns, [inner / per_step][panel][per_step] each, zero-padded.
template <class T>
class PanelMatrix {
 public:
  // source: B [inner, outer] with strides inner_stride, outer_stride.
  bool pack(const T* source, std::int64_t outer, std::int64_t inner, std::int64_t outer_stride,
            std::int64_t inner_stride) {
    constexpr int per = Element<T>::per_step;
    outer_ = outer;
    steps_ = (inner + per - 1) / per;
    if (!data_.resize(round_up(outer, panel<T>) * steps_ * per)) return false;
    for (std::int64_t j = 0; j < outer; j += panel<T>) {
      const std::int64_t width = outer - j < panel<T> ? outer - j : panel<T>;
      for (std::int64_t k = 0; k < inner; ++k) {
        const T* from = source + j * outer_stride + k * inner_stride;
        T* to = data_ + j / panel<T> * panel_size() + k / per * panel<T> * per + k % per;
        if (outer_stride == 1 && width == panel<T>)  // the compiler vectorizes this loop
          for (int i = 0; i < panel<T>; ++i) to[i * per] = from[i];
        else
          for (std::int64_t i = 0; i < width; ++i) to[i * per] = from[i * outer_stride];
      }
    }
    return true;
  }
  // Calls emit(i, j, vector) for a w. a: [round_up(rows, block_rows), inner] with row stride a_row; run: see gemm
  template <class Emit>
  INR_INLINE void multiply(const PanelMatrix& w, const T* a, std::int64_t rows, std::int64_t a_row, Emit emit,
                           std::int64_t run = longest_run) {
    constexpr int per = Element<T>::per_step;
    gemm<T>(rows, w.outer_, w.steps_, a, a_row, per, w.data_, panel<T> * per, w.panel_size(), emit, run);
  }

 private:
  std::int64_t panel_size() const { return steps_ * panel<T> * Element<T>::per_step; }
  Buffer<T> data_;
  std::int64_t outer_ = 0, steps_ = 0;
};

#if defined(__AMX_BF16__)
// Weights of float32, twice: split into parts for the tile unit, and as panels for products with large numbers, for
// which the products of parts might overflow where float32's do not, and with infinity and NaN.
class TileOrPanelMatrix {
 public:
  bool pack(const float* source, std::int64_t outer, std::int64_t inner, std::int64_t outer_stride,
            std::int64_t inner_stride) {
    inner_ = inner, has_parts_ = true;
    for (std::int64_t n = 0; n < outer; ++n)
      for (std::int64_t k = 0; k < inner; ++k)
        has_parts_ &= (bits_of(source[n * outer_stride + k * inner_stride]) & magnitude) < limit;
    return panels_.pack(source, outer, inner, outer_stride, inner_stride) &&
           tiles_.pack(source, outer, inner, outer_stride, inner_stride);
  }
  template <class Emit>
  INR_INLINE void multiply(const TileOrPanelMatrix& w, const float* a, std::int64_t rows, std::int64_t a_row,
                           Emit emit, std::int64_t run = longest_run) {
    if (w.has_parts_ && have_parts(a, rows, w.inner_, a_row))
      TileMatrix<float>::multiply(w.tiles_, a, rows, a_row, emit);
    else
      PanelMatrix<float>::multiply(w.panels_, a, rows, a_row, emit, run);
  }

 private:
  // Numbers below 2^60 are split: their products are far from the largest number.
  static constexpr std::uint32_t magnitude = 0x7fffffff, limit = 0x5d800000;
  // a: [rows, inner] with row stride a_row
  static bool have_parts(const float* a, std::int64_t rows, std::int64_t inner, std::int64_t a_row) {
    Words large{};
    for (std::int64_t r = 0; r < rows; ++r, a += a_row)
      for (std::int64_t k = 0; k < inner; k += lanes<float>) {
        const Vec<float> v = inner - k >= lanes<float> ? load(a + k) : load_part(a + k, inner - k);
        large |= (Words)(((Words)v & magnitude) >= limit);
      }
    return !_mm512_test_epi32_mask((__m512i)large, (__m512i)large);
  }

  PanelMatrix<float> panels_;
  TileMatrix<float> tiles_;
  std::int64_t inner_ = 0;
  bool has_parts_ = false;
};
#endif

// A matrix that is packed for each product, and weights: packed once for many, for the units that multiply it fastest.
// All have pack and multiply of PanelMatrix, but may not emit the rows after the last.
#if defined(__AMX_BF16__)
template <class T>
using PackedMatrix = std::conditional_t<std::is_same<T, bf16>::value, TileMatrix<bf16>, PanelMatrix<T>>;
template <class T>
using WeightMatrix = std::conditional_t<std::is_same<T, float>::value, TileOrPanelMatrix, PackedMatrix<T>>;
#else
template <class T>
using PackedMatrix = PanelMatrix<T>;
template <class T>
using WeightMatrix = PanelMatrix<T>;
#endif

}  // namespace INR_ISA
}  // namespace inr
