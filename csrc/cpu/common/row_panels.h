// C = A B where A (weights) is packed in panels of rows and B (activations) is a row-major tile.
#pragma once

#include <utility>

#include "gemm.h"

namespace inr {
namespace INR_ISA {

// Divides rows into blocks of block_rows and, at the end, of two thirds of it, so that few rows are padding.
class RowBlocks {
 public:
  static constexpr int small_height = 2 * block_rows / 3;
  explicit RowBlocks(std::int64_t rows = 0) {
    const std::int64_t thirds = divide_up(rows, block_rows / 3);
    full_ = thirds / 3 - (thirds > 1 && thirds % 3 == 1);
    count_ = full_ + divide_up(thirds - 3 * full_, 2);
  }
  std::int64_t count() const { return count_; }
  // The first row of a block; of block count(): all rows with the padding.
  std::int64_t first(std::int64_t block) const {
    const std::int64_t full = smaller(block, full_);
    return full * block_rows + (block - full) * small_height;
  }
  int height(std::int64_t block) const { return block < full_ ? block_rows : small_height; }

 private:
  std::int64_t full_, count_;
};

// acc[r][v] = sum over k < steps of a[k * a_step + r] * vector v of b[k * b_row].
template <class T, int R, int V>
INR_INLINE void multiply_rows(std::int64_t steps, const T* a, std::int64_t a_step, const T* b, std::int64_t b_row,
                              Vec<T> (&acc)[R][V]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
  for (const T* end = a + steps * a_step; a != end; a += a_step, b += b_row) {
    Vec<T> bv[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) bv[v] = load(b + v * lanes<T>);
    __builtin_prefetch(a + weights_ahead * a_step);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += a[r] * bv[v];
  }
}

// A matrix [rows, steps] as [steps][height] for each of its RowBlocks, zero-padded, in memory of the caller's.
template <class T>
class RowPanels {
 public:
  static std::int64_t size(std::int64_t rows, std::int64_t steps) {
    const RowBlocks blocks(rows);
    return blocks.first(blocks.count()) * steps;
  }
  RowPanels() = default;
  // data: [size(rows, steps)]
  RowPanels(T* data, std::int64_t rows, std::int64_t steps) : data_(data), blocks_(rows), steps_(steps) {}
  // [height]: the rows of a block at one step.
  T* block(std::int64_t i, std::int64_t step) const {
    return data_ + blocks_.first(i) * steps_ + step * blocks_.height(i);
  }
  // Packs the rows of block i, of which `count` exist. from: [count, steps]
  void pack(std::int64_t i, const T* from, std::int64_t count) const {
    constexpr std::int64_t run = 64;  // steps whose packed rows stay in the first cache
    const int height = blocks_.height(i);
    for (std::int64_t begin = 0; begin < steps_; begin += run)
      for (int r = 0; r < height; ++r)
        for (std::int64_t k = begin; k < smaller(begin + run, steps_); ++k)
          block(i, k)[r] = r < count ? from[r * steps_ + k] : T(0);
  }
  // Calls emit(j, sums) for the rows of block i of a times each V vectors of columns of b; sums: [height][V].
  // b: [steps, round_up(cols, V lanes)] with row stride b_row.
  // Long sums are split into runs of steps, so that rounding errors do not grow with the number of steps.
  template <std::int64_t run = 64, int V = 2, class Emit>
  INR_INLINE void multiply(const RowPanels& a, std::int64_t i, const T* b, std::int64_t b_row, std::int64_t cols,
                           Emit&& emit) {
    if (a.blocks_.height(i) == block_rows)
      multiply_block<block_rows, run, V>(a, i, b, b_row, cols, emit);
    else
      multiply_block<RowBlocks::small_height, run, V>(a, i, b, b_row, cols, emit);
  }

 private:
  template <int R, std::int64_t run, int V, class Emit>
  INR_INLINE void multiply_block(const RowPanels& a, std::int64_t i, const T* b, std::int64_t b_row, std::int64_t cols,
                                 Emit&& emit) {
    for (std::int64_t j = 0; j < cols; j += V * lanes<T>) {
      Vec<T> sums[R][V] = {};
      for (std::int64_t k = 0; k < a.steps_; k += run) {
        Vec<T> acc[R][V];
        multiply_rows<T, R, V>(smaller(a.steps_ - k, run), a.block(i, k), R, b + k * b_row + j, b_row, acc);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[r][v] += acc[r][v];
      }
      emit(j, sums);
    }
  }

  T* data_ = nullptr;
  RowBlocks blocks_;
  std::int64_t steps_ = 0;
};

// A matrix [rows, steps] as the RowPanels of its chunks of steps, one after the other: what a product with one chunk
// reads is contiguous, as the processor's prefetching needs it.
template <class T, std::int64_t chunk_steps>
class ChunkedRowPanels {
 public:
  ChunkedRowPanels() = default;
  // data: [RowPanels<T>::size(rows, steps)]
  ChunkedRowPanels(T* data, std::int64_t rows, std::int64_t steps) : data_(data), rows_(rows), steps_(steps) {}
  // The chunk that begins at a step.
  RowPanels<T> chunk(std::int64_t first) const {
    return {data_ + RowPanels<T>::size(rows_, first), rows_, smaller(steps_ - first, chunk_steps)};
  }
  // See RowPanels.
  T* block(std::int64_t i, std::int64_t step) const {
    const std::int64_t within = step % chunk_steps;
    return chunk(step - within).block(i, within);
  }

 private:
  T* data_ = nullptr;
  std::int64_t rows_ = 0, steps_ = 0;
};

// Splits the elements of a, b in a row into those at even and at odd indices.
template <class V, std::size_t... I>
INR_INLINE void deinterleave(V a, V b, V& even, V& odd, std::index_sequence<I...>) {
  constexpr int n = int(sizeof...(I)), half = n / 2;
  if constexpr (vector_bytes == 32) {
    // AVX2 is slow at moving single elements between the halves of a vector: first the low halves of a and b are joined,
    // and the high ones; then each half of the result takes every second element of the same halves of both.
    static_assert(n % 4 == 0);
    const V low = __builtin_shufflevector(a, b, (int(I) < half ? int(I) : half + int(I))...);
    const V high = __builtin_shufflevector(a, b, (int(I) < half ? half + int(I) : n + int(I))...);
    constexpr auto index = [](int i) { return i / half * half + (i % half < half / 2 ? 0 : n - half) + 2 * (i % half); };
    even = __builtin_shufflevector(low, high, index(int(I))...);
    odd = __builtin_shufflevector(low, high, (index(int(I)) + 1)...);
  } else {
    even = __builtin_shufflevector(a, b, int(2 * I)...);
    odd = __builtin_shufflevector(a, b, int(2 * I + 1)...);
  }
}
template <class V, std::size_t... I>
INR_INLINE void interleave(V even, V odd, V& a, V& b, std::index_sequence<I...>) {
  constexpr std::size_t n = sizeof...(I);
  a = __builtin_shufflevector(even, odd, int(I % 2 * n + I / 2)...);
  b = __builtin_shufflevector(even, odd, int(I % 2 * n + (I + n) / 2)...);
}

// Splits the elements of p into those at even and at odd indices, and back. p: [2 lanes]
template <class T>
INR_INLINE void load_pairs(const T* p, Vec<T>& even, Vec<T>& odd) {
  deinterleave(load(p), load(p + lanes<T>), even, odd, std::make_index_sequence<lanes<T>>{});
}
template <class T>
INR_INLINE void store_pairs(T* p, Vec<T> even, Vec<T> odd) {
  Vec<T> a, b;
  interleave(even, odd, a, b, std::make_index_sequence<lanes<T>>{});
  store(p, a);
  store(p + lanes<T>, b);
}

}  // namespace INR_ISA
}  // namespace inr
