// The backward recomputes each tile's forward. There are no atomics: every thread sums into its own buffers, which are
// then added in the order of the threads. Long sums are split into sums per tile, which reduces their rounding error.
#include <atomic>
#include <new>

#include "../entries.h"
#include "common.h"

namespace inr {
namespace INR_ISA {
namespace {

// Sorts the queries by the feature rows that they read, so that each thread's share reads few rows.
// order: [queries], allocated here
Status sort_queries(const LocalImplicit& p, Buffer<std::int64_t>& order) {
  const std::int64_t rows = p.batch * p.band_rows, n = p.queries();
  Buffer<std::int64_t> row(n), start(rows + 1);
  if (!row || !start || !order.resize(n)) return Status::out_of_memory;
  for (std::int64_t i = 0; i < n; ++i) {
    Neighbours q;
    if (!locate(p, i, q)) return Status::row_outside_band;
    row[i] = q.pixel[0] / p.width;
    ++start[row[i] + 1];
  }
  for (std::int64_t r = 0; r < rows; ++r) start[r + 1] += start[r];
  for (std::int64_t i = 0; i < n; ++i) order[start[row[i]]++] = i;
  return Status::ok;
}

// The sums and tiles of one thread.
template <class T>
struct GradientWorker {
  Buffer<T> weight[max_depth];        // [round_up(outputs, block_rows)][columns(inputs)]
  Buffer<T> bias[max_depth];          // [round_up(outputs, panel)]
  Buffer<T> position, position_tile;  // [4][stride of PackedWeights]; all tiles', the current tile's
  Buffer<T> hoisted;                  // [row_end - row_begin][width][channels]
  std::int64_t row_begin = 0, row_end = 0;
  Buffer<T> h[max_depth];                      // [tile_rows][stride], the input of each layer
  Buffer<T> mean, grad_mean, grad, grad_next;  // [tile_rows][stride]

  static std::int64_t columns(std::int64_t inputs) { return round_up(inputs, panel<T>); }

  bool allocate(const LocalImplicit& p, bool weights, std::int64_t stride) {
    bool ok = mean.resize(tile_rows * stride) && grad_mean.resize(tile_rows * stride) &&
              grad.resize(tile_rows * stride) && grad_next.resize(tile_rows * stride);
    for (std::int64_t i = 0; i < p.depth && ok; ++i) {
      ok = h[i].resize(tile_rows * stride);
      if (ok && weights)
        ok = weight[i].resize(round_up(p.widths[i + 1], block_rows) * columns(p.inputs(i))) &&
             bias[i].resize(round_up(p.widths[i + 1], panel<T>));
    }
    const std::int64_t size = 4 * round_up(p.widths[0], lanes<T>);
    return ok && (!weights || (position.resize(size) && position_tile.resize(size)));
  }
};

// Adds grad^T h to layer i's weight gradient, and the sum of grad's rows to its bias gradient.
// grad, h: [rows][stride]
template <class T>
void add_weight_gradient(GradientWorker<T>& worker, const LocalImplicit& p, std::int64_t i, const T* grad, const T* h,
                         std::int64_t rows, std::int64_t stride) {
  const std::int64_t outputs = p.widths[i + 1], ld = GradientWorker<T>::columns(p.inputs(i));
  T* weight = worker.weight[i];
  gemm<T>(outputs, p.inputs(i), rows, grad, 1, stride, h, stride, panel<T>,
          [&](std::int64_t n, std::int64_t k, Vec<T> v) { store(weight + n * ld + k, load(weight + n * ld + k) + v); });
  for (std::int64_t n = 0; n < outputs; n += lanes<T>) {
    Vec<T> sum{};
    for (std::int64_t r = 0; r < rows; ++r) sum += load(grad + r * stride + n);
    store(worker.bias[i] + n, load(worker.bias[i] + n) + sum);
  }
}

// to = grad W, set to zero where the ReLU output `activation` is not positive (nullptr: no ReLU).
// grad, activation, to: [rows][stride]
template <class T>
void input_gradient(const WeightMatrix<T>& transposed, const T* grad, std::int64_t rows, std::int64_t stride,
                    const T* activation, T* to) {
  WeightMatrix<T>::multiply(transposed, grad, rows, stride, [&](std::int64_t r, std::int64_t n, Vec<T> v) {
    if (activation) v = load(activation + r * stride + n) > 0 ? v : Vec<T>{};
    store(to + r * stride + n, v);
  });
}

// Adds v to the elements [n, n + lanes) of a row but those past the last. row: [channels]
template <class T>
INR_INLINE void add_to_row(T* row, std::int64_t n, std::int64_t channels, Vec<T> v) {
  store_row(row, n, channels, load_row(row, n, channels) + v);
}

// Texture: adds one query's gradients of the first layer. grad, of the layer's output: [neighbours][stride]
template <class T>
void texture_gradient(GradientWorker<T>& worker, const LocalImplicit& p, const PackedWeights<T>& w,
                      const Neighbours& q, const T* grad, std::int64_t stride) {
  const std::int64_t count = p.frequencies();
  for (int t = 0; t < p.neighbours(); ++t, grad += stride) {
    const T* coefficient = static_cast<const T*>(p.hoisted) + q.pixel[t] * p.channels();
    T* target = worker.hoisted ? worker.hoisted + (q.pixel[t] - worker.row_begin * p.width) * p.channels() : nullptr;
    for (std::int64_t n = 0; n < count; n += lanes<T>) {
      Vec<T> cosine, sine;
      waves(p, w, q, t, n, cosine, sine);
      const Vec<T> of_cosine = load_row(grad, n, count), of_sine = load_row(grad + count, n, count);
      const Vec<T> angle = (of_sine * load_row(coefficient + count, n, count) * cosine -
                            of_cosine * load_row(coefficient, n, count) * sine) * T(3.14159265358979323846);
      if (worker.position)
        for (int j = 0; j < 2; ++j) {
          T* sum = worker.position_tile + j * w.stride + n;
          store(sum, load(sum) + angle * T(q.cell[j]));
        }
      if (!target) continue;
      add_to_row(target, n, count, of_cosine * cosine);
      add_to_row(target + count, n, count, of_sine * sine);
      for (int j = 0; j < 2; ++j) add_to_row(target + (2 + j) * count, n, count, angle * T(q.rel[t][j]));
    }
  }
}

// Adds one query's gradients of the first layer. grad, of the layer's output: [rows_per_query][stride]
template <class T>
void first_layer_gradient(GradientWorker<T>& worker, const LocalImplicit& p, const PackedWeights<T>& w,
                          const Neighbours& q, const T* grad, std::int64_t stride) {
  if (p.texture) return texture_gradient(worker, p, w, q, grad, stride);
  T* target[4];
  for (int t = 0; t < p.neighbours() && worker.hoisted; ++t)
    target[t] = worker.hoisted + (q.pixel[t] - worker.row_begin * p.width) * p.widths[0];
  for (std::int64_t n = 0; n < p.widths[0]; n += lanes<T>) {
    for (int t = 0; t < p.neighbours(); ++t) {
      Vec<T> g;
      if (p.ensemble_first)
        g = first_layer(p, w, q, t, n) > 0 ? load(grad + n) * T(q.weight[t]) : Vec<T>{};
      else
        g = load(grad + t * stride + n);
      if (worker.position) {
        const T offsets[4] = {T(q.rel[t][0]), T(q.rel[t][1]), T(q.cell[0]), T(q.cell[1])};
        for (std::int64_t j = 0; j < p.position_inputs(); ++j) {
          T* sum = worker.position_tile + j * w.stride + n;
          store(sum, load(sum) + g * offsets[j]);
        }
      }
      if (worker.hoisted) add_to_row(target[t], n, p.widths[0], g);
    }
  }
}

// query: [count] indices of queries; grad_out: [queries, widths[depth]]; transposed: [depth]
template <class T>
Status backward_tile(GradientWorker<T>& worker, const LocalImplicit& p, const PackedWeights<T>& w,
                     const WeightMatrix<T>* transposed, const std::int64_t* query, std::int64_t count,
                     const T* grad_out, std::int64_t stride, bool weights) {
  Neighbours q[tile_rows];
  const int per_query = rows_per_query(p);
  const std::int64_t rows = count * per_query, last = p.depth - 1, channels = p.widths[p.depth];
  for (std::int64_t k = 0; k < count; ++k) {
    if (!locate(p, query[k], q[k])) return Status::row_outside_band;
    first_layer_rows<T>(p, w, q[k], worker.h[0] + k * per_query * stride, stride);
    for (std::int64_t o = 0; o < channels; ++o) worker.grad[k * stride + o] = grad_out[query[k] * channels + o];
  }
  for (std::int64_t i = 0; i < last; ++i) hidden_layer<T>(w, i, worker.h[i], rows, stride, worker.h[i + 1]);

  T *grad = worker.grad, *next = worker.grad_next;
  const auto activation = [&](std::int64_t i) -> const T* {
    return p.rectified(i) ? static_cast<const T*>(worker.h[i]) : nullptr;
  };
  if (p.ensemble_first) {
    if (weights) add_weight_gradient<T>(worker, p, last, grad, worker.h[last], count, stride);
    input_gradient<T>(transposed[last], grad, count, stride, activation(last), next);
  } else {
    const std::int64_t width = p.widths[last];
    const bool rectified = p.rectified(last);
    if (weights) {
      for (std::int64_t k = 0; k < count; ++k)
        ensemble<T>(p, q[k], worker.h[last] + k * per_query * stride, stride, width, worker.mean + k * stride);
      add_weight_gradient<T>(worker, p, last, grad, worker.mean, count, stride);
    }
    input_gradient<T>(transposed[last], grad, count, stride, static_cast<const T*>(nullptr), worker.grad_mean);
    for (std::int64_t k = 0; k < count; ++k)
      for (int t = 0; t < per_query; ++t)
        for (std::int64_t n = 0, row = (k * per_query + t) * stride; n < width; n += lanes<T>) {
          const Vec<T> g = load(worker.grad_mean + k * stride + n) * T(q[k].weight[t]);
          store(next + row + n, !rectified ? g : load(worker.h[last] + row + n) > 0 ? g : Vec<T>{});
        }
  }
  for (std::int64_t i = last - 1; i >= 0; --i) {
    T* swap = grad;
    grad = next;
    next = swap;
    if (weights) add_weight_gradient<T>(worker, p, i, grad, worker.h[i], rows, stride);
    input_gradient<T>(transposed[i], grad, rows, stride, activation(i), next);
  }
  for (std::int64_t k = 0; k < count; ++k)
    first_layer_gradient<T>(worker, p, w, q[k], next + k * per_query * stride, stride);
  for (std::int64_t n = 0; weights && n < 4 * w.stride; n += lanes<T>) {
    store(worker.position + n, load(worker.position + n) + load(worker.position_tile + n));
    store(worker.position_tile + n, Vec<T>{});
  }
  return Status::ok;
}

// Allocates the gradient of the feature rows that the queries order[begin ... end) read. order: [queries]
template <class T>
bool allocate_rows(GradientWorker<T>& worker, const LocalImplicit& p, const std::int64_t* order, std::int64_t begin,
                   std::int64_t end) {
  for (std::int64_t k = begin; k < end; ++k) {
    Neighbours q;
    locate(p, order[k], q);
    const std::int64_t low = q.pixel[0] / p.width, high = q.pixel[p.neighbours() - 1] / p.width + 1;
    if (k == begin) worker.row_begin = low;
    worker.row_end = high > worker.row_end ? high : worker.row_end;
  }
  return worker.hoisted.resize((worker.row_end - worker.row_begin) * p.width * p.channels());
}

// Adds the gradients of all threads. workers: [n]; stride: of PackedWeights
template <class T>
void sum_workers(const LocalImplicit& p, GradientWorker<T>* workers, int n, const LocalImplicitGradients& grads,
                 std::int64_t stride) {
  if (grads.weights) {
    for (std::int64_t i = 0; i < p.depth; ++i) {
      const std::int64_t outputs = p.widths[i + 1], inputs = p.inputs(i), ld = GradientWorker<T>::columns(inputs);
      T *weight = static_cast<T*>(grads.weights[i]), *bias = static_cast<T*>(grads.biases[i]);
      for (std::int64_t o = 0; o < outputs; ++o) {
        bias[o] = 0;
        for (int t = 0; t < n; ++t) bias[o] += workers[t].bias[i][o];
        for (std::int64_t k = 0; k < inputs; ++k) {
          T sum = 0;
          for (int t = 0; t < n; ++t) sum += workers[t].weight[i][o * ld + k];
          weight[o * inputs + k] = sum;
        }
      }
    }
    const std::int64_t columns = p.position_inputs();
    for (std::int64_t c = 0; c < p.position_outputs(); ++c)
      for (std::int64_t j = 0; j < columns; ++j) {
        T sum = 0;
        for (int t = 0; t < n; ++t) sum += workers[t].position[j * stride + c];
        static_cast<T*>(grads.position_weight)[c * columns + j] = sum;
      }
  }
  if (grads.hoisted) {
    const std::int64_t row_size = p.width * p.channels(), rows = p.batch * p.band_rows;
    parallel(n, [&](int share) {
      for (std::int64_t r = rows * share / n; r < rows * (share + 1) / n; ++r) {
        T* to = static_cast<T*>(grads.hoisted) + r * row_size;
        std::memset(static_cast<void*>(to), 0, std::size_t(row_size) * sizeof(T));
        for (int t = 0; t < n; ++t) {
          if (r < workers[t].row_begin || r >= workers[t].row_end) continue;
          const T* from = workers[t].hoisted + (r - workers[t].row_begin) * row_size;
          for (std::int64_t i = 0; i < row_size; ++i) to[i] += from[i];
        }
      }
    });
  }
}

template <class T>
Status backward(const LocalImplicit& p, const T* grad_out, const LocalImplicitGradients& grads) {
  PackedWeights<T> w;
  WeightMatrix<T> transposed[max_depth];
  if (!w.prepare(p)) return Status::out_of_memory;
  for (std::int64_t i = 0; i < p.depth; ++i)
    if (!transposed[i].pack(static_cast<const T*>(p.weights[i]), p.inputs(i), p.widths[i + 1], 1, p.inputs(i)))
      return Status::out_of_memory;
  Buffer<std::int64_t> order;
  if (const Status s = sort_queries(p, order); s != Status::ok) return s;

  const std::int64_t stride = tile_stride<T>(p), queries = p.queries(), tile = tile_queries(p);
  const int n = useful_threads(p);
  struct Pool {
    GradientWorker<T>* workers;
    explicit Pool(int n) : workers(new (std::nothrow) GradientWorker<T>[n]) {}
    ~Pool() { delete[] workers; }
  } pool(n);
  if (!pool.workers) return Status::out_of_memory;
  std::atomic<Status> status{Status::ok};
  parallel(n, [&](int share) {
    GradientWorker<T>& worker = pool.workers[share];
    const std::int64_t begin = queries * share / n, end = queries * (share + 1) / n;
    if (!worker.allocate(p, grads.weights, stride) ||
        (grads.hoisted && !allocate_rows(worker, p, order, begin, end))) {
      status = Status::out_of_memory;
      return;
    }
    for (std::int64_t first = begin; first < end && status == Status::ok; first += tile) {
      const std::int64_t count = end - first < tile ? end - first : tile;
      const Status s = backward_tile<T>(worker, p, w, transposed, order + first, count, grad_out, stride,
                                        grads.weights);
      if (s != Status::ok) status = s;
    }
  });
  if (status == Status::ok) sum_workers(p, pool.workers, n, grads, w.stride);
  return status;
}

}  // namespace

Status local_implicit_backward(Type type, const LocalImplicit& p, const void* grad_out,
                               const LocalImplicitGradients& grads) {
  switch (type) {
    case Type::float32: return backward(p, static_cast<const float*>(grad_out), grads);
    case Type::float64: return backward(p, static_cast<const double*>(grad_out), grads);
    case Type::bfloat16:
    case Type::float16: break;
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
