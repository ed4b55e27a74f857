// Shared by the forward and the backward of local_implicit: packed weights and layers.
//
// Queries are processed in tiles of about `tile_rows` evaluations of the MLP (query x neighbour), whose hidden states
// stay in the caches through all layers.
#pragma once

#include "../../common/neighbours.h"
#include "../common/gemm.h"
#include "../common/tasks.h"

namespace inr {
namespace INR_ISA {

constexpr int tile_rows = 96;  // a multiple of 4 neighbours and of every block_rows

// Rows of a tile per query: one per neighbour, or one if the ensemble comes first.
INR_INLINE int rows_per_query(const LocalImplicit& p) { return p.ensemble_first ? 1 : p.neighbours(); }
INR_INLINE int tile_queries(const LocalImplicit& p) { return tile_rows / rows_per_query(p); }

INR_INLINE int useful_threads(const LocalImplicit& p) {
  double flops = 0;
  for (std::int64_t i = 0; i < p.depth; ++i)
    flops += 2.0 * double(p.widths[i]) * double(p.widths[i + 1]) * double(p.queries()) * rows_per_query(p);
  return useful_threads(flops, p.threads);
}

// The row stride of a tile, wide enough for every layer.
template <class T>
INR_INLINE std::int64_t tile_stride(const LocalImplicit& p) {
  std::int64_t widest = p.inputs(0);
  for (std::int64_t i = 1; i <= p.depth; ++i) widest = p.widths[i] > widest ? p.widths[i] : widest;
  return row_stride<T>(widest);
}

// The weights as the kernels read them: matrices packed in panels, vectors zero-padded to whole SIMD vectors.
template <class T>
struct PackedWeights {
  WeightMatrix<T> forward[max_depth];
  Buffer<Real<T>> bias[max_depth];  // [round_up(outputs, panel)]
  Buffer<Real<T>> position;         // [4][stride]
  std::int64_t stride;              // widths[0] in whole vectors

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
    for (std::int64_t n = 0; n < p.position_outputs(); ++n)
      for (std::int64_t j = 0; j < columns; ++j) position[j * stride + n] = to_real(w[n * columns + j]);
    return true;
  }
};

// Loads elements [n, n + lanes) of a row; those past the last are zero. row: [channels]
template <class T>
INR_INLINE Vec<T> load_row(const T* row, std::int64_t n, std::int64_t channels) {
  if (n + lanes<T> <= channels) return load(row + n);
  T tail[lanes<T>] = {};
  for (std::int64_t i = n; i < channels; ++i) tail[i - n] = row[i];
  return load(tail);
}

// The first layer before its ReLU, for neighbour t of a query and the channels [n, n + lanes).
template <class T>
INR_INLINE Vec<T> first_layer(const LocalImplicit& p, const PackedWeights<T>& w, const Neighbours& q, int t,
                              std::int64_t n) {
  const T* row = static_cast<const T*>(p.hoisted) + q.pixel[t] * p.widths[0];
  Vec<T> v = load_row(row, n, p.widths[0]) + load(w.position + n) * Real<T>(q.rel[t][0]) +
             load(w.position + w.stride + n) * Real<T>(q.rel[t][1]);
  if (p.position_inputs() == 4)
    v += load(w.position + 2 * w.stride + n) * Real<T>(q.cell[0]) +
         load(w.position + 3 * w.stride + n) * Real<T>(q.cell[1]);
  return v;
}

// Texture: the cosine and the sine of neighbour t's angle, for the frequencies [n, n + lanes).
template <class T>
INR_INLINE void waves(const LocalImplicit& p, const PackedWeights<T>& w, const Neighbours& q, int t, std::int64_t n,
                      Vec<T>& cosine, Vec<T>& sine) {
  const std::int64_t count = p.frequencies();
  const T* frequency = static_cast<const T*>(p.hoisted) + q.pixel[t] * p.channels() + 2 * count;
  const Vec<T> phase = load(w.position + n) * Real<T>(q.cell[0]) + load(w.position + w.stride + n) * Real<T>(q.cell[1]);
  sincos_pi(load_row(frequency, n, count) * Real<T>(q.rel[t][0]) +
                load_row(frequency + count, n, count) * Real<T>(q.rel[t][1]) + phase,
            sine, cosine);
}

// Stores elements [n, n + lanes) of a row but those past the last. row: [channels]
template <class T>
INR_INLINE void store_row(T* row, std::int64_t n, std::int64_t channels, Vec<T> v) {
  if (n + lanes<T> <= channels)
    store(row + n, v);
  else
    store_part(row + n, v, channels - n);
}

// Texture: writes coefficients times cosines, and coefficients times sines. h: [neighbours][stride]
template <class T>
INR_INLINE void texture_rows(const LocalImplicit& p, const PackedWeights<T>& w, const Neighbours& q, T* h,
                             std::int64_t stride) {
  const std::int64_t count = p.frequencies();
  for (int t = 0; t < p.neighbours(); ++t, h += stride) {
    const T* coefficient = static_cast<const T*>(p.hoisted) + q.pixel[t] * p.channels();
    for (std::int64_t n = 0; n < count; n += lanes<T>) {
      Vec<T> cosine, sine;
      waves(p, w, q, t, n, cosine, sine);
      store_row(h, n, count, load_row(coefficient, n, count) * cosine);
      store_row(h + count, n, count, load_row(coefficient + count, n, count) * sine);
    }
  }
}

// Writes the first layer's output for one query. h: [rows_per_query][stride]
template <class T>
INR_INLINE void first_layer_rows(const LocalImplicit& p, const PackedWeights<T>& w, const Neighbours& q, T* h,
                                 std::int64_t stride) {
  if (p.texture) return texture_rows(p, w, q, h, stride);
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
    from_real(Real<T>(0), cell + 2);  // completes the last pair, for bfloat16 and an odd width
  }
}

// The weighted mean over a query's neighbours. h: [neighbours][stride]; mean: [stride]
template <class T>
INR_INLINE void ensemble(const LocalImplicit& p, const Neighbours& q, const T* h, std::int64_t stride,
                         std::int64_t channels, T* mean) {
  for (std::int64_t n = 0; n < channels; n += lanes<T>) {
    Vec<T> v{};
    for (int t = 0; t < p.neighbours(); ++t) v += load(h + t * stride + n) * Real<T>(q.weight[t]);
    store(mean + n, v);
  }
}

// to = relu(from W_i^T + b_i). from, to: [rows][stride], with rows rounded up to block_rows
template <class T>
INR_INLINE void hidden_layer(const PackedWeights<T>& w, std::int64_t i, const T* from, std::int64_t rows,
                             std::int64_t stride, T* to) {
  WeightMatrix<T>::multiply(w.forward[i], from, rows, stride, [&](std::int64_t r, std::int64_t n, Vec<T> v) {
    store(to + r * stride + n, relu(v + load(w.bias[i] + n)));
  });
}

}  // namespace INR_ISA
}  // namespace inr
