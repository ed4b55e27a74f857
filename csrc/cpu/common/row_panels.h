// C = A B where A (weights) is packed in panels of block_rows rows and B (activations) is a row-major tile.
#pragma once

#include <utility>

#include "gemm.h"

namespace inr {
namespace INR_ISA {

// A matrix [rows, steps] as [rows / block_rows][steps][block_rows], zero-padded, in memory of the caller's.
template <class T>
class RowPanels {
 public:
  static std::int64_t size(std::int64_t rows, std::int64_t steps) { return round_up(rows, block_rows) * steps; }
  RowPanels() = default;
  // data: [size(rows, steps)]
  RowPanels(T* data, std::int64_t steps) : data_(data), steps_(steps) {}
  // [block_rows]: rows [i, i + block_rows) at one step; i is a multiple of block_rows.
  T* block(std::int64_t i, std::int64_t step) const { return data_ + i * steps_ + step * block_rows; }
  // Calls emit(j, sums) for the rows [i, i + block_rows) of a times each panel of columns of b.
  // b: [steps, round_up(cols, panel)] with row stride b_row.
  // Long sums are split into runs of steps, so that rounding errors do not grow with the number of steps.
  template <std::int64_t run = 64, class Emit>
  INR_INLINE void multiply(const RowPanels& a, std::int64_t i, const T* b, std::int64_t b_row, std::int64_t cols,
                           Emit emit) {
    for (std::int64_t j = 0; j < cols; j += panel<T>) {
      Vec<T> sums[block_rows][2] = {};
      for (std::int64_t k = 0; k < a.steps_; k += run) {
        Vec<T> acc[block_rows][2];
        const std::int64_t steps = a.steps_ - k < run ? a.steps_ - k : run;
        micro_kernel<T, 2>(steps, a.block(i, k), 1, block_rows, b + k * b_row + j, b_row, acc);
#pragma GCC unroll 12
        for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) sums[r][v] += acc[r][v];
      }
      emit(j, sums);
    }
  }

 private:
  T* data_ = nullptr;
  std::int64_t steps_ = 0;
};

// A matrix [rows, steps] as the RowPanels of its chunks of steps, one after the other: what a product with one chunk
// reads is contiguous, as the processor's prefetching needs it.
template <class T, std::int64_t chunk_steps>
class ChunkedRowPanels {
 public:
  ChunkedRowPanels() = default;
  // data: [RowPanels<T>::size(rows, steps)]
  ChunkedRowPanels(T* data, std::int64_t rows, std::int64_t steps)
      : data_(data), rows_(round_up(rows, block_rows)), steps_(steps) {}
  // The chunk that begins at a step.
  RowPanels<T> chunk(std::int64_t first) const {
    return {data_ + first * rows_, steps_ - first < chunk_steps ? steps_ - first : chunk_steps};
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

template <class V, std::size_t... I>
INR_INLINE void deinterleave(V a, V b, V& even, V& odd, std::index_sequence<I...>) {
  even = __builtin_shufflevector(a, b, int(2 * I)...);
  odd = __builtin_shufflevector(a, b, int(2 * I + 1)...);
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
