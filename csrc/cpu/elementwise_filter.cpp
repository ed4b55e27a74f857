#include "elementwise_filter.h"

#include <type_traits>

namespace inr {
namespace INR_ISA {
namespace {

// N vectors of an output row from column X on; w, taps: those of its channel.
template <int N, bool Box, class T>
INR_INLINE void filter(const Rows<T>& rows, const Real<T>* w, std::int64_t X) {
  using R = Real<T>;
  const ElementwiseFilter& p = rows.p;
  const std::int64_t count = p.gamma || Box ? p.taps() : 0;
  const R* const* taps = rows.taps;
  Vec<T> sum[N]{}, box[N]{};
  for (std::int64_t t = 0; t < count; ++t)
    for (int n = 0; n < N; ++n) {
      const Vec<T> z = load(taps[t] + X + n * lanes<T>);
      sum[n] += load(w + t * rows.plan.padded + X + n * lanes<T>) * z;
      if (Box) box[n] += z;
    }
  for (int n = 0; n < N; ++n) {
    Vec<T> out = p.gamma ? sum[n] * R(p.gamma) : Vec<T>{};
    if (Box) out += box[n] * R(p.beta);
    if (p.alpha) out += load(taps[p.taps() / 2] + X + n * lanes<T>) * R(p.alpha);
    store(rows.value + X + n * lanes<T>, out);
  }
}

template <bool Box, class T>
void filter_row(const Rows<T>& rows, const Real<T>* w) {
  std::int64_t X = 0;
  for (; X + 4 * lanes<T> <= rows.plan.padded; X += 4 * lanes<T>) filter<4, Box>(rows, w, X);
  for (; X < rows.plan.padded; X += lanes<T>) filter<1, Box>(rows, w, X);
}

template <class T>
Status forward(const ElementwiseFilter& p, T* out) {
  const Plan<T> plan(p);
  return for_each_task<Rows<T>>(plan, [&](Rows<T>& rows, const Task& task) {
    const std::int64_t last = plan.first_output(task.end), channel = task.image * p.channels + task.unit * plan.channels;
    rows.stage_image(task);
    for (std::int64_t Y = plan.first_output(task.begin); Y < last; ++Y) {
      if (p.gamma) rows.stage_weights(task, Y);
      for (std::int64_t i = 0; i < p.dilation_count; ++i) {
        rows.find_offsets(p.dilations[i]);
        for (std::int64_t c = 0; c < plan.channels; ++c) {
          rows.find_taps(c, Y, p.dilations[i]);
          p.beta ? filter_row<true>(rows, rows.weights_of(c)) : filter_row<false>(rows, rows.weights_of(c));
          const std::int64_t plane = i * p.batch * p.channels + channel + c;
          unstage(rows.value, p.out_width, out + (plane * p.out_height + Y) * p.out_width);
        }
      }
    }
  });
}

// Rows and the gradients that gather on them.
//
// A task owns its source rows. It goes through every output row that reads one of them, in order, and adds only to
// its own: so two bands compute the rows between them twice, nobody waits, and the sums do not depend on the cut.
template <class T>
class GradientRows : public Rows<T> {
 public:
  using R = Real<T>;
  using Rows<T>::p;
  using Rows<T>::plan;
  using Rows<T>::offsets;
  using Rows<T>::taps;
  using Rows<T>::value;
  using Rows<T>::weights;

  explicit GradientRows(const Plan<T>& plan) : Rows<T>(plan) {
    sums.resize(plan.channels * plan.band_rows * plan.row + lanes<T>);
    gradients.resize(plan.unit_groups * p.taps() * plan.padded);
    line.resize(p.width);
  }
  explicit operator bool() const { return Rows<T>::operator bool() && sums && gradients && line; }

  void clear_sums() { clear(sums, plan.channels * plan.band_rows * plan.row); }
  void clear_gradients() { clear(gradients, plan.unit_groups * p.taps() * plan.padded); }

  // value (the output's gradient) x image -> the weights' gradients
  void add_to_gradients(std::int64_t c) {
    R* to = gradients + (this->weights_of(c) - weights);
    for (std::int64_t t = 0; t < p.taps(); ++t, to += plan.padded)
      for (std::int64_t X = 0; X < plan.padded; X += lanes<T>)
        store(to + X, load(to + X) + load(value + X) * load(taps[t] + X));
  }

  // value x weights -> the image's gradient, where the task owns the row
  void add_to_sums(const Task& task, std::int64_t c, std::int64_t Y, std::int64_t dilation) {
    const R* w = this->weights_of(c);
    for (std::int64_t i = 0; i < p.kernel_height; ++i, w += p.kernel_width * plan.padded) {
      const std::int64_t y = plan.source_row(Y, i, dilation);
      if (y < task.begin || y >= task.end) continue;
      R* to = sums + (c * plan.band_rows + y - task.begin) * plan.row;
      if (p.alpha && i == p.kernel_height / 2)
        add(to + offsets[p.kernel_width / 2], [&](std::int64_t) { return Vec<T>{} + R(p.alpha); });
      for (std::int64_t j = 0; j < p.kernel_width; ++j) {
        const R* tap = w + j * plan.padded;
        if (p.gamma)
          add(to + offsets[j], [&](std::int64_t X) { return load(tap + X) * R(p.gamma) + R(p.beta); });
        else if (p.beta)
          add(to + offsets[j], [&](std::int64_t) { return Vec<T>{} + R(p.beta); });
      }
    }
  }

  // gradients of the weights -> of the logits: s (d - sum s d)
  void finish_gradients() {
    const std::int64_t n = plan.unit_groups * p.taps();
    for (std::int64_t X = 0; X < plan.padded; X += lanes<T>) {
      Vec<T> mean{};
      const bool softmax = p.normalize != Normalize::none;
      for (std::int64_t t = 0; softmax && t < n; ++t) mean += load(weights + t * plan.padded + X) * load(at(t, X));
      for (std::int64_t t = 0; t < n; ++t) {
        const Vec<T> d = (load(at(t, X)) - mean) * R(p.gamma);
        store(at(t, X), softmax ? d * load(weights + t * plan.padded + X) : d);
      }
    }
  }

  Buffer<R> sums;       // [channels][band_rows][row]
  Buffer<R> gradients;  // [unit_groups * taps][padded]
  Buffer<R> line;       // [width]

 private:
  R* at(std::int64_t t, std::int64_t X) { return gradients + t * plan.padded + X; }
  void clear(R* p, std::int64_t n) { std::memset(static_cast<void*>(p), 0, std::size_t(n) * sizeof(R)); }
  template <class F>
  void add(R* to, F factor) {
    for (std::int64_t X = 0; X < plan.padded; X += lanes<T>)
      store(to + X, load(to + X) + load(value + X) * factor(X));
  }
};

template <class T>
Status backward(const ElementwiseFilter& p, const T* grad_out, T* grad_x, T* grad_kernel) {
  const Plan<T> plan(p);
  return for_each_task<GradientRows<T>>(plan, [&](GradientRows<T>& rows, const Task& task) {
    const std::int64_t channel = task.image * p.channels + task.unit * plan.channels;
    const std::int64_t own = plan.first_output(task.begin), end = plan.first_output(task.end);
    const std::int64_t above = grad_x ? plan.first_output(task.begin - plan.reach) : own;
    const std::int64_t below = grad_x ? plan.first_output(task.end + plan.reach) : end;
    if (grad_kernel) rows.stage_image(task);
    if (grad_x) rows.clear_sums();
    for (std::int64_t Y = above; Y < below; ++Y) {
      const bool owned = grad_kernel && Y >= own && Y < end;
      if (p.gamma && (grad_x || p.normalize != Normalize::none)) rows.stage_weights(task, Y);
      if (owned) rows.clear_gradients();
      for (std::int64_t i = 0; i < p.dilation_count; ++i) {
        rows.find_offsets(p.dilations[i]);
        for (std::int64_t c = 0; c < plan.channels; ++c) {
          const std::int64_t plane = i * p.batch * p.channels + channel + c;
          stage(grad_out + (plane * p.out_height + Y) * p.out_width, 1, p.out_width, rows.value);
          if (owned && p.gamma) {
            rows.find_taps(c, Y, p.dilations[i]);
            rows.add_to_gradients(c);
          }
          if (grad_x) rows.add_to_sums(task, c, Y, p.dilations[i]);
        }
      }
      if (!owned) continue;
      if (p.gamma) rows.finish_gradients();
      const std::int64_t n = plan.unit_groups * p.taps();
      T* to = grad_kernel + ((task.image * plan.units + task.unit) * n * p.out_height + Y) * p.out_width;
      for (std::int64_t t = 0; t < n; ++t)
        unstage(rows.gradients + t * plan.padded, p.out_width, to + t * p.out_height * p.out_width);
    }
    for (std::int64_t c = 0; grad_x && c < plan.channels; ++c)
      for (std::int64_t y = task.begin; y < task.end; ++y)
        plan.unpad(rows.sums + (c * plan.band_rows + y - task.begin) * plan.row, rows.line,
                   grad_x + ((channel + c) * p.height + y) * p.width);
  });
}

}  // namespace

Status elementwise_filter_forward(Type type, const ElementwiseFilter& p, void* out) {
  switch (type) {
    case Type::float32: return forward(p, static_cast<float*>(out));
    case Type::float64: return forward(p, static_cast<double*>(out));
    case Type::bfloat16: return forward(p, static_cast<bf16*>(out));
    case Type::float16: return forward(p, static_cast<f16*>(out));
  }
  return Status::unsupported_type;
}

Status elementwise_filter_backward(Type type, const ElementwiseFilter& p, const void* grad_out, void* grad_x,
                                   void* grad_kernel) {
  const auto run = [&](auto* typed) {
    using T = typename std::remove_pointer<decltype(typed)>::type;
    return backward(p, static_cast<const T*>(grad_out), static_cast<T*>(grad_x), static_cast<T*>(grad_kernel));
  };
  switch (type) {
    case Type::float32: return run(static_cast<float*>(nullptr));
    case Type::float64: return run(static_cast<double*>(nullptr));
    case Type::bfloat16: return run(static_cast<bf16*>(nullptr));
    case Type::float16: return run(static_cast<f16*>(nullptr));
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
