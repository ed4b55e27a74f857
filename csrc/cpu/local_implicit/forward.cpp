#include "common.h"

#include "../entries.h"

namespace inr {
namespace INR_ISA {
namespace {

// Decodes the queries [first, first + count). a, b, result: [tile_rows][stride]; out: [queries, widths[depth]]
template <class T>
Status decode_tile(const LocalImplicit& p, const PackedWeights<T>& w, std::int64_t first, std::int64_t count, T* a,
                   T* b, Real<T>* result, std::int64_t stride, T* out) {
  Neighbours q[tile_rows];
  const int rows = rows_per_query(p);
  for (std::int64_t k = 0; k < count; ++k) {
    if (!locate(p, first + k, q[k])) return Status::row_outside_band;
    first_layer_rows(p, w, q[k], a + k * rows * stride, stride);
  }
  for (std::int64_t i = 0; i + 1 < p.depth; ++i) {
    hidden_layer(w, i, a, count * rows, stride, b);
    T* swap = a;
    a = b;
    b = swap;
  }
  if (!p.ensemble_first) {
    for (std::int64_t k = 0; k < count; ++k)
      ensemble(p, q[k], a + k * rows * stride, stride, p.widths[p.depth - 1], b + k * stride);
    a = b;
  }
  const std::int64_t last = p.depth - 1, channels = p.widths[p.depth];
  WeightMatrix<T>::multiply(w.forward[last], a, count, stride, [&](std::int64_t r, std::int64_t n, Vec<T> v) {
    store(result + r * stride + n, v + load(w.bias[last] + n));
  });
  for (std::int64_t k = 0; k < count; ++k)
    for (std::int64_t o = 0; o < channels; ++o) from_real(result[k * stride + o], out + (first + k) * channels + o);
  return Status::ok;
}

template <class T>
Status forward(const LocalImplicit& p, T* out) {
  PackedWeights<T> weights;
  if (!weights.prepare(p)) return Status::out_of_memory;
  const std::int64_t stride = tile_stride<T>(p), queries = p.queries(), tile = tile_queries(p);
  struct Worker {
    explicit Worker(std::int64_t n) : a(n), b(n), result(n) {}
    explicit operator bool() const { return a && b && result; }
    Buffer<T> a, b;
    Buffer<Real<T>> result;
  };
  return for_each_task(
      useful_threads(p), (queries + tile - 1) / tile, [&] { return Worker(tile_rows * stride); },
      [&](Worker& w, std::int64_t i) {
        const std::int64_t first = i * tile, count = queries - first < tile ? queries - first : tile;
        return decode_tile<T>(p, weights, first, count, w.a, w.b, w.result, stride, out);
      });
}

}  // namespace

Status local_implicit_forward(Type type, const LocalImplicit& p, void* out) {
  switch (type) {
    case Type::float32: return forward(p, static_cast<float*>(out));
    case Type::float64: return forward(p, static_cast<double*>(out));
    case Type::bfloat16:
#if defined(__AVX512BF16__)
      return forward(p, static_cast<bf16*>(out));
#endif
      break;
    case Type::float16: break;
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
