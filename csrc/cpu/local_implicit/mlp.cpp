// A multi-layer perceptron on rows, with a LayerNorm before it and a sum after it.
//
// A task is a tile of rows, whose hidden layers stay in the caches: they are never stored as a whole.
#include <cmath>

#include "../common/gemm.h"
#include "../common/tasks.h"
#include "../entries.h"

namespace inr {
namespace INR_ISA {
namespace {

// x Phi(x), Phi the normal distribution function: 1 - q and q for x and -x, x > 0, where 2 q = erfc(x / sqrt 2). This is
// e^(-x^2 / 2) times a polynomial of t, which was fitted: its error is at most 1.7e-8.
INR_INLINE Vec<float> gelu(Vec<float> x) {
  const Vec<float> z = (x < 0 ? -x : x) * 0.70710678f, t = 1.f / (1.f + z * 0.55f);
  Vec<float> q = t * 0.1073359826f - 0.5180858943f;
  for (const float c : {0.7597928207f, -0.0414900082f, 0.3908679195f, 0.3015792964f}) q = q * t + c;
  q *= exp_negative(-z * z) * t * 0.5f;
  return x * (x < 0 ? q : 1.f - q);
}
INR_INLINE Vec<double> gelu(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] *= 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
  return x;
}

template <class T>
struct Layer {
  WeightMatrix<T> weight;
  Buffer<T> bias;  // [round_up(outputs, panel)]
  bool prepare(const T* w, const T* b, std::int64_t outputs, std::int64_t inputs) {
    if (!weight.pack(w, outputs, inputs, inputs, 1) || !bias.resize(round_up(outputs, panel<T>))) return false;
    std::memcpy(bias, b, std::size_t(outputs) * sizeof(T));
    return true;
  }
};

template <class T>
class RowwiseMlp {
 public:
  explicit RowwiseMlp(const Mlp& problem) : p_(problem) {
    std::int64_t widest = p_.widths[0];
    for (std::int64_t i = 1; i < p_.depth; ++i) widest = p_.widths[i] > widest ? p_.widths[i] : widest;
    stride_ = row_stride<T>(widest);
    // Both tiles together take at most about 0.5 MB, and whole blocks of the products.
    tile_ = clamp((1 << 18) / (stride_ * std::int64_t(sizeof(T))) / unit * unit, unit, 96);
  }
  bool prepare() {
    for (std::int64_t i = 0; i < p_.depth; ++i)
      if (!layers_[i].prepare(static_cast<const T*>(p_.weights[i]), static_cast<const T*>(p_.biases[i]),
                              p_.widths[i + 1], p_.widths[i]))
        return false;
    return true;
  }
  std::int64_t tasks() const { return (p_.rows + tile_ - 1) / tile_; }
  std::int64_t tile_size() const { return tile_ * stride_; }
  int threads() const {
    double flops = 0;
    for (std::int64_t i = 0; i < p_.depth; ++i)
      flops += 2.0 * double(p_.rows) * double(p_.widths[i]) * double(p_.widths[i + 1]);
    return useful_threads(flops, p_.threads);
  }

  // from, to: [tile][stride], work buffers; out: [rows, widths[depth]]
  void run(std::int64_t task, T* from, T* to, T* out) const {
    const std::int64_t first = task * tile_, count = p_.rows - first < tile_ ? p_.rows - first : tile_;
    load_rows(first, count, from);
    for (std::int64_t i = 0; i + 1 < p_.depth; ++i) {
      const Layer<T>& layer = layers_[i];
      const T* bias = layer.bias;
      const auto store_hidden = [&](auto activation) {
        WeightMatrix<T>::multiply(layer.weight, from, count, stride_, [&](std::int64_t r, std::int64_t n, Vec<T> v) {
          store(to + r * stride_ + n, activation(v + load(bias + n)));
        });
      };
      if (p_.activation == Activation::gelu)
        store_hidden([](Vec<T> v) { return gelu(v); });
      else
        store_hidden([](Vec<T> v) { return relu(v); });
      T* swap = from;
      from = to;
      to = swap;
    }
    const Layer<T>& last = layers_[p_.depth - 1];
    const std::int64_t outputs = p_.widths[p_.depth];
    const T* bias = last.bias;
    const T* add = static_cast<const T*>(p_.add);
    WeightMatrix<T>::multiply(last.weight, from, count, stride_, [&](std::int64_t r, std::int64_t n, Vec<T> v) {
      if (r >= count) return;
      const std::int64_t at = (first + r) * outputs + n, left = outputs - n;
      v += load(bias + n);
      if (left >= lanes<T>) {
        if (add) v += load(add + at);
        store(out + at, v);
      } else {
        if (add) v += load_part(add + at, left);
        store_part(out + at, v, left);
      }
    });
  }

 private:
  static constexpr std::int64_t unit = 2 * block_rows;

  // Copies rows of x, normalized if there is a norm. to: [tile][stride]
  void load_rows(std::int64_t first, std::int64_t count, T* to) const {
    const std::int64_t width = p_.widths[0];
    const T* from = static_cast<const T*>(p_.x) + first * width;
    for (std::int64_t r = 0; r < count; ++r, from += width, to += stride_)
      if (p_.norm_weight)
        normalize(from, to);
      else
        std::memcpy(to, from, std::size_t(width) * sizeof(T));
  }
  // from, to: [widths[0]], and whole vectors of `to` are writable
  void normalize(const T* from, T* to) const {
    const std::int64_t width = p_.widths[0], whole = width / lanes<T> * lanes<T>;
    const T *weight = static_cast<const T*>(p_.norm_weight), *bias = static_cast<const T*>(p_.norm_bias);
    const auto part = [&](const T* row, std::int64_t n) {
      return n < whole ? load(row + n) : load_part(row + n, width - n);
    };
    Vec<T> sums{};
    for (std::int64_t n = 0; n < width; n += lanes<T>) sums += part(from, n);
    const T mean = sum(sums) / T(width);
    Vec<T> squares{};
    for (std::int64_t n = 0; n < whole; n += lanes<T>) {
      const Vec<T> centred = load(from + n) - mean;
      squares += centred * centred;
    }
    T square = sum(squares);
    for (std::int64_t n = whole; n < width; ++n) square += (from[n] - mean) * (from[n] - mean);
    const T scale = T(1) / std::sqrt(square / T(width) + T(p_.eps));
    for (std::int64_t n = 0; n < width; n += lanes<T>) {
      Vec<T> v = (part(from, n) - mean) * scale * part(weight, n);
      if (bias) v += part(bias, n);
      store(to + n, v);
    }
  }
  static T sum(Vec<T> v) {
    T total = 0;
    for (int i = 0; i < lanes<T>; ++i) total += v[i];
    return total;
  }

  const Mlp& p_;
  Layer<T> layers_[max_depth];
  std::int64_t stride_, tile_;
};

template <class T>
Status forward(const Mlp& p, T* out) {
  RowwiseMlp<T> mlp(p);
  if (!mlp.prepare()) return Status::out_of_memory;
  struct Worker {
    explicit Worker(std::int64_t n) : from(n), to(n) {}
    explicit operator bool() const { return from && to; }
    Buffer<T> from, to;
  };
  return for_each_task(
      mlp.threads(), mlp.tasks(), [&] { return Worker(mlp.tile_size()); },
      [&](Worker& w, std::int64_t i) {
        mlp.run(i, w.from, w.to, out);
        return Status::ok;
      });
}

}  // namespace

Status mlp(Type type, const Mlp& p, void* out) {
  if (type == Type::float32) return forward(p, static_cast<float*>(out));
  if (type == Type::float64) return forward(p, static_cast<double*>(out));
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
