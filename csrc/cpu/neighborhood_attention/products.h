// Matrix products of small tiles: scores, weighted sums of values, and gradients.
#pragma once

#include "blocks.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr int product_rows = vector_bytes == 64 ? 8 : 4;  // x 2 vectors of sums in registers

// One block of `product`, from row i and column j on.
template <int V, class T, class Emit>
INR_INLINE void product_block(std::int64_t i, std::int64_t j, std::int64_t steps, const T* a, std::int64_t a_row,
                              std::int64_t a_step, const T* b, std::int64_t b_step, Emit emit) {
  Vec<T> sum[product_rows][V]{};
  a += i * a_row, b += j;
  for (std::int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
    Vec<T> right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load(b + v * lanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < product_rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * a_row] * right[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < product_rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) emit(i + r, j + v * lanes<T>, sum[r][v]);
}

// Calls emit(i, j, sums) for i < round_up(rows, product_rows) and every vector j ... j + lanes of `columns`, a multiple
// of lanes: sums = sum_k a[i][k] b[k][j], k < steps. a: element i, k at i a_row + k a_step; b: rows b_step apart
template <class T, class Emit>
INR_INLINE void product(std::int64_t rows, std::int64_t columns, std::int64_t steps, const T* a, std::int64_t a_row,
                        std::int64_t a_step, const T* b, std::int64_t b_step, Emit emit) {
  for (std::int64_t i = 0; i < rows; i += product_rows)
    for (std::int64_t j = 0; j < columns; j += 2 * lanes<T>)
      if (columns - j > lanes<T>)
        product_block<2>(i, j, steps, a, a_row, a_step, b, b_step, emit);
      else
        product_block<1>(i, j, steps, a, a_row, a_step, b, b_step, emit);
}

// Scores of some keys and V vectors of queries: to[k][v] = sum_d keys[k][d] queries[d][v]. Steps: from key to key, and
// from row to row of queries and of scores.
template <int Keys, int V, class R>
INR_NOINLINE void multiply_block(const R* keys, std::int64_t key_step, const R* queries, std::int64_t step,
                                 std::int64_t dim, R* to) {
  Vec<R> sum[Keys][V]{};
  for (std::int64_t d = 0; d < dim; ++d) {
    Vec<R> query[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) query[v] = load(queries + d * step + v * lanes<R>);
#pragma GCC unroll 12
    for (int k = 0; k < Keys; ++k)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[k][v] += keys[k * key_step + d] * query[v];
  }
#pragma GCC unroll 12
  for (int k = 0; k < Keys; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(to + k * step + v * lanes<R>, sum[k][v]);
}

constexpr int max_queries = 4, max_channels = registers == 32 ? 6 : 3;  // queries and vectors of sums in registers

// A rectangle of keys in a row-major array: `row` and `step` are the distances of rows and of neighbours in a row.
template <class R>
struct Rectangle {
  const R* data;
  std::int64_t row, step;
};

// Weighted sums over rows x across keys, for some queries and V vectors of channels: to[q][v] = sum_n weights[n][q]
// values[n][v].
template <int Queries, int V, class R>
INR_NOINLINE void combine_block(std::int64_t rows, std::int64_t across, Rectangle<R> weights, Rectangle<R> values,
                                R* to) {
  Vec<R> sum[Queries][V]{};
  for (std::int64_t t = 0; t < rows; ++t) {
    const R *weight = weights.data + t * weights.row, *from = values.data + t * values.row;
    for (std::int64_t c = 0; c < across; ++c, weight += weights.step, from += values.step) {
      Vec<R> value[V];
#pragma GCC unroll 6
      for (int v = 0; v < V; ++v) value[v] = load(from + v * lanes<R>);
#pragma GCC unroll 4
      for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 6
        for (int v = 0; v < V; ++v) sum[q][v] += weight[q] * value[v];
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 6
    for (int v = 0; v < V; ++v) store(to + (q * V + v) * lanes<R>, sum[q][v]);
}

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
