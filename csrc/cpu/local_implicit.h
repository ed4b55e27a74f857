// What the forward and the backward kernels of local_implicit share: packed weights and the first layer.
//
// Queries go through the whole MLP in tiles of about `tile_rows` evaluations (query x neighbour), whose
// hidden states never leave the caches.
#pragma once

#include "../common/neighbours.h"
#include "gemm.h"
#include "tasks.h"

namespace inr {
namespace INR_ISA {

constexpr int tile_rows = 96;  // a multiple of 4 neighbours and of every block_rows

// tile_queries: with the ensemble first, or with one neighbour, a row is a query.
INR_INLINE int rows_per_query(const LocalImplicit& p) { return p.ensemble_first ? 1 : p.neighbours(); }
INR_INLINE int tile_queries(const LocalImplicit& p) { return tile_rows / rows_per_query(p); }

INR_INLINE int useful_threads(const LocalImplicit& p) {
  double flops = 0;
  for (std::int64_t i = 0; i < p.depth; ++i)
    flops += 2.0 * double(p.widths[i]) * double(p.widths[i + 1]) * double(p.queries()) * rows_per_query(p);
  return useful_threads(flops, p.threads);
}

// Row stride that serves every layer's tile.
template <class T>
INR_INLINE std::int64_t tile_stride(const LocalImplicit& p) {
  std::int64_t widest = p.inputs(0);
  for (std::int64_t i = 1; i <= p.depth; ++i) widest = p.widths[i] > widest ? p.widths[i] : widest;
  return row_stride<T>(widest);
}

// The weights in the form that the kernels read: matrices in panels, vectors padded to whole ones.
template <class T>
struct Weights {
  Packed<T> forward[max_depth];
  Buffer<Real<T>> bias[max_depth];
  Buffer<Real<T>> position;  // [4][stride]
  std::int64_t stride;

  bool prepare(const LocalImplicit& p) {
    for (std::int64_t i = 0; i < p.depth; ++i) {
      const std::int64_t outputs = p.widths[i + 1], inputs = p.inputs(i);
      if (!forward[i].pack(static_cast<const T*>(p.weights[i]), outputs, inputs, inputs, 1)) return false;
      if (!bias[i].resize(round_up(outputs, panel<T>))) return false;
      for (std::int64_t n = 0; n < outputs; ++n) bias[i][n] = to_real(static_cast<const T*>(p.biases[i])[n]);
    }
    stride = round_up(p.widths[0], lanes<T>);
    if (!position.resize(4 * stride)) return false;
    const std::int64_t columns = p.position_inputs();
    const T* w = static_cast<const T*>(p.position_weight);
    for (std::int64_t n = 0; n < p.widths[0]; ++n)
      for (std::int64_t j = 0; j < columns; ++j) position[j * stride + n] = to_real(w[n * columns + j]);
    return true;
  }
};

// The hoisted row of a pixel, a vector at a time: whole vectors in place, the ragged last one through a copy.
template <class T>
INR_INLINE Vec<T> load_row(const T* row, std::int64_t n, std::int64_t channels) {
  if (n + lanes<T> <= channels) return load(row + n);
  T tail[lanes<T>] = {};
  for (std::int64_t i = n; i < channels; ++i) tail[i - n] = row[i];
  return load(tail);
}

// The first layer before its ReLU, for neighbour t and the channels [n, n + lanes).
template <class T>
INR_INLINE Vec<T> first_layer(const LocalImplicit& p, const Weights<T>& w, const Neighbours& q, int t,
                              std::int64_t n) {
  const T* row = static_cast<const T*>(p.hoisted) + q.pixel[t] * p.widths[0];
  Vec<T> v = load_row(row, n, p.widths[0]) + load(w.position + n) * Real<T>(q.rel[t][0]) +
             load(w.position + w.stride + n) * Real<T>(q.rel[t][1]);
  if (p.position_inputs() == 4)
    v += load(w.position + 2 * w.stride + n) * Real<T>(q.cell[0]) +
         load(w.position + 3 * w.stride + n) * Real<T>(q.cell[1]);
  return v;
}

// The first layer's output for one query: rows_per_query rows of `h`.
template <class T>
INR_INLINE void first_rows(const LocalImplicit& p, const Weights<T>& w, const Neighbours& q, T* h,
                           std::int64_t stride) {
  for (std::int64_t n = 0; n < p.widths[0]; n += lanes<T>) {
    if (!p.ensemble_first) {
      for (int t = 0; t < p.neighbours(); ++t) store(h + t * stride + n, relu(first_layer(p, w, q, t, n)));
    } else {
      Vec<T> mean{};
      for (int t = 0; t < p.neighbours(); ++t)
        mean += relu(first_layer(p, w, q, t, n)) * Real<T>(q.weight[t]);
      store(h + n, mean);
    }
  }
  if (p.inputs(0) > p.widths[0]) {
    T* cell = h + p.widths[0];
    from_real(Real<T>(q.cell[0]), cell);
    from_real(Real<T>(q.cell[1]), cell + 1);
    from_real(Real<T>(0), cell + 2);  // the other half of an odd last pair
  }
}

// The weighted mean of a query's rows of `h`.
template <class T>
INR_INLINE void ensemble(const LocalImplicit& p, const Neighbours& q, const T* h, std::int64_t stride,
                         std::int64_t channels, T* mean) {
  for (std::int64_t n = 0; n < channels; n += lanes<T>) {
    Vec<T> v{};
    for (int t = 0; t < p.neighbours(); ++t) v += load(h + t * stride + n) * Real<T>(q.weight[t]);
    store(mean + n, v);
  }
}

// to = relu(from W^T + b)
template <class T>
INR_INLINE void hidden_layer(const Weights<T>& w, std::int64_t i, const T* from, std::int64_t rows,
                             std::int64_t stride, T* to) {
  Packed<T>::multiply(w.forward[i], from, rows, stride, [&](std::int64_t r, std::int64_t n, Vec<T> v) {
    store(to + r * stride + n, relu(v + load(w.bias[i] + n)));
  });
}

}  // namespace INR_ISA
}  // namespace inr
