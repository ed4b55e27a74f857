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

// erfc(z) for z >= 0, as e^(-z^2) times a polynomial in a fraction of z; both were fitted. The errors of the fits are
// 1.7e-8 and 2.3e-17.
INR_INLINE Vec<float> erfc_positive(Vec<float> z) {
  const Vec<float> t = 1.f / (1.f + z * 0.55f);
  Vec<float> sum = t * 0.1073359826f - 0.5180858943f;
  for (const float c : {0.7597928207f, -0.0414900082f, 0.3908679195f, 0.3015792964f}) sum = sum * t + c;
  return sum * t * exp_negative(-z * z);
}
INR_INLINE Vec<double> erfc_positive(Vec<double> z) {
  const Vec<double> r = 1. / (z + 3.75), t = 1. - 7.5 * r;  // t: (z - 3.75) / (z + 3.75)
  Vec<double> sum = t * -2.42838318103716807e-10 - 2.83174312238750745e-9;
  for (const double c :
       {2.84614960878599266e-9, 3.38531014784934664e-8, -2.60927398833068508e-8, -2.54300317507274607e-7,
        2.7888606197611317e-7, 1.64744638949575752e-6, -3.28876242935093481e-6, -8.89886673862871955e-6,
        3.74714136244121882e-5, 1.05920413050591118e-5, -3.48646776294797364e-4, 7.94823577968900581e-4,
        9.8633806781503807e-4, -0.0125358801126986153, 0.0491187786162407222, -0.131955401172574615,
        0.279062049033747615, -0.490470291207907435, 0.736318925221752066, -0.958741576652906963,
        1.09192290956278904})
    sum = sum * t + c;
  return sum * r * exp_negative(-z * z);
}

// x Phi(x), Phi the normal distribution function: erfc(z) / 2 for -x and 1 - erfc(z) / 2 for x, z = x / sqrt 2.
template <class V>
INR_INLINE V gelu(V x) {
  using R = std::conditional_t<sizeof(x[0]) == sizeof(float), float, double>;
  const V q = erfc_positive((x < 0 ? -x : x) * R(0.70710678118654752440)) * R(0.5);
  return x * (x < 0 ? q : 1 - q);
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
    // Whole blocks of the products; both tiles together take about 0.5 MB, or more for the fewest rows of wide layers.
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
        }, run_of_sums);
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
    }, run_of_sums);
  }

 private:
  static constexpr std::int64_t unit = 2 * block_rows;
  static constexpr std::int64_t run_of_sums = 64;  // layers are wide: errors of long sums would exceed torch's

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
    T rest = 0, square = 0;  // rest: what the rounded mean lacks
    Vec<T> rests{}, squares{};
    for (std::int64_t n = 0; n < whole; n += lanes<T>) {
      const Vec<T> centred = load(from + n) - mean;
      rests += centred, squares += centred * centred;
    }
    for (std::int64_t n = whole; n < width; ++n) {
      const T centred = from[n] - mean;
      rest += centred, square += centred * centred;
    }
    rest = (rest + sum(rests)) / T(width);
    square = (square + sum(squares)) / T(width) - rest * rest;
    const T scale = T(1) / std::sqrt((square < 0 ? T(0) : square) + T(p_.eps));
    for (std::int64_t n = 0; n < width; n += lanes<T>) {
      Vec<T> v = (part(from, n) - mean - rest) * scale * part(weight, n);
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
