#include "elementwise_filter_direct.h"

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
      sum[n] += load(w + t * rows.plan.line + X + n * lanes<T>) * z;
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
  if (is_direct(p)) return forward_direct(p, out);
  const Plan<T> plan(p);
  return for_each_band<Rows<T>>(plan, [&](Rows<T>& rows, const Task& task) {
    const std::int64_t last = plan.first_output(task.end), channel = task.image * p.channels + task.unit * plan.channels;
    rows.stage_image(task);
    for (std::int64_t Y = plan.first_output(task.begin); Y < last; Y += plan.block) {
      const std::int64_t count = clamp(last - Y, 0, plan.block);
      if (p.gamma) rows.stage_weights(task, Y, count);
      for (std::int64_t i = 0; i < p.dilation_count; ++i) {
        rows.find_offsets(p.dilations[i]);
        for (std::int64_t c = 0; c < plan.channels; ++c)
          for (std::int64_t r = 0; r < count; ++r) {
            rows.find_taps(c, Y + r, p.dilations[i]);
            const Real<T>* w = rows.weights_of(c) + r * plan.padded;
            p.beta ? filter_row<true>(rows, w) : filter_row<false>(rows, w);
            const std::int64_t plane = i * p.batch * p.channels + channel + c;
            unstage(rows.value, p.out_width, out + (plane * p.out_height + Y + r) * p.out_width);
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
    gradients.resize(plan.unit_groups * p.taps() * plan.line);
    line.resize(p.width);
  }
  explicit operator bool() const { return Rows<T>::operator bool() && sums && gradients && line; }

  void clear_sums() {
    std::memset(static_cast<void*>(sums), 0, std::size_t(plan.channels * plan.band_rows * plan.row) * sizeof(R));
  }

  // value (the output's gradient) x image -> the weights' gradients in row r; `first`: nothing stands there yet
  void add_to_gradients(std::int64_t c, std::int64_t r, bool first) {
    R* to = gradients + (this->weights_of(c) - weights) + r * plan.padded;
    for (std::int64_t t = 0; t < p.taps(); ++t, to += plan.line)
      for (std::int64_t X = 0; X < plan.padded; X += lanes<T>) {
        const Vec<T> d = load(value + X) * load(taps[t] + X);
        store(to + X, first ? d : load(to + X) + d);
      }
  }

  // value x weights -> the image's gradient, where the task owns the row
  void add_to_sums(const Task& task, std::int64_t c, std::int64_t Y, std::int64_t r, std::int64_t dilation) {
    const R* w = this->weights_of(c) + r * plan.padded;
    for (std::int64_t i = 0; i < p.kernel_height; ++i, w += p.kernel_width * plan.line) {
      const std::int64_t y = plan.source_row(Y + r, i, dilation);
      if (y < task.begin || y >= task.end) continue;
      R* to = sums + (c * plan.band_rows + y - task.begin) * plan.row;
      if (p.alpha && i == p.kernel_height / 2)
        add(to + offsets[p.kernel_width / 2], [&](std::int64_t) { return Vec<T>{} + R(p.alpha); });
      for (std::int64_t j = 0; j < p.kernel_width; ++j) {
        const R* tap = w + j * plan.line;
        if (p.gamma)
          add(to + offsets[j], [&](std::int64_t X) { return load(tap + X) * R(p.gamma) + R(p.beta); });
        else if (p.beta)
          add(to + offsets[j], [&](std::int64_t) { return Vec<T>{} + R(p.beta); });
      }
    }
  }

  // gradients of the weights -> of the logits, s (d - sum s d), in the rows [begin, end); written to `to`
  void finish_gradients(std::int64_t begin, std::int64_t end, T* to) {
    const std::int64_t n = plan.unit_groups * p.taps(), plane = p.out_height * p.out_width;
    const bool softmax = p.normalize != Normalize::none;
    const bool whole = plan.padded == p.out_width && reinterpret_cast<std::uintptr_t>(to) % vector_bytes == 0;
    for (std::int64_t X = begin * plan.padded; X < end * plan.padded; X += lanes<T>) {
      Vec<T> mean{};
      for (std::int64_t t = 0; softmax && t < n; ++t) mean += load(weights + t * plan.line + X) * load(at(t, X));
      for (std::int64_t t = 0; t < n; ++t) {
        const Vec<T> d = (load(at(t, X)) - mean) * R(p.gamma);
        const Vec<T> result = softmax ? d * load(weights + t * plan.line + X) : d;
        if constexpr (sizeof(T) == sizeof(R)) {
          if (whole) {
            stream(to + t * plane + X - begin * plan.padded, result);
            continue;
          }
        }
        store(at(t, X), result);
      }
    }
    if (sizeof(T) == sizeof(R) && whole) return;
    for (std::int64_t t = 0; t < n; ++t)
      for (std::int64_t r = begin; r < end; r = whole ? end : r + 1)
        unstage(at(t, r * plan.padded), whole ? (end - begin) * p.out_width : p.out_width,
                to + t * plane + (r - begin) * p.out_width);
  }

  Buffer<R> sums;       // [channels][band_rows][row]
  Buffer<R> gradients;  // [unit_groups * taps][block][padded]
  Buffer<R> line;       // [width]

 private:
  R* at(std::int64_t t, std::int64_t X) { return gradients + t * plan.line + X; }
  template <class F>
  void add(R* to, F factor) {
    for (std::int64_t X = 0; X < plan.padded; X += lanes<T>)
      store(to + X, load(to + X) + load(value + X) * factor(X));
  }
};

template <class T>
Status backward(const ElementwiseFilter& p, const T* grad_out, T* grad_x, T* grad_kernel) {
  if (is_direct(p)) return backward_direct(p, grad_out, grad_x, grad_kernel);
  const Plan<T> plan(p);
  return for_each_band<GradientRows<T>>(plan, [&](GradientRows<T>& rows, const Task& task) {
    const std::int64_t channel = task.image * p.channels + task.unit * plan.channels;
    const std::int64_t own = plan.first_output(task.begin), end = plan.first_output(task.end);
    const std::int64_t above = grad_x ? plan.first_output(task.begin - plan.reach) : own;
    const std::int64_t below = grad_x ? plan.first_output(task.end + plan.reach) : end;
    if (grad_kernel) rows.stage_image(task);
    if (grad_x) rows.clear_sums();
    for (std::int64_t Y = above; Y < below; Y += plan.block) {
      const std::int64_t count = clamp(below - Y, 0, plan.block);
      const std::int64_t first = clamp(own - Y, 0, count), last = clamp(end - Y, 0, count);  // rows owned
      if (p.gamma && (grad_x || p.normalize != Normalize::none)) rows.stage_weights(task, Y, count);
      for (std::int64_t i = 0; i < p.dilation_count; ++i) {
        rows.find_offsets(p.dilations[i]);
        for (std::int64_t c = 0; c < plan.channels; ++c)
          for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t plane = i * p.batch * p.channels + channel + c;
            stage(grad_out + (plane * p.out_height + Y + r) * p.out_width, 1, p.out_width, rows.value);
            if (grad_kernel && p.gamma && r >= first && r < last) {
              rows.find_taps(c, Y + r, p.dilations[i]);
              rows.add_to_gradients(c, r, i == 0 && c % (plan.channels / plan.unit_groups) == 0);
            }
            if (grad_x) rows.add_to_sums(task, c, Y, r, p.dilations[i]);
          }
      }
      if (grad_kernel && first < last)
        rows.finish_gradients(first, last, grad_kernel + (task.image * plan.units + task.unit) * plan.unit_groups *
                                                             p.taps() * p.out_height * p.out_width +
                                               (Y + first) * p.out_width);
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
