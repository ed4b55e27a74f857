#include <type_traits>

#include "../../common/pages.h"
#include "common.h"

namespace inr {
namespace INR_ISA {
namespace {

// Direct3x3Rows and the sums of the image's gradient.
template <class T>
class Direct3x3GradientRows : public Direct3x3Rows<T> {
 public:
  using R = Real<T>;
  using FilterRows<T>::p;
  using FilterRows<T>::plan;
  using FilterRows<T>::offsets;

  explicit Direct3x3GradientRows(const FilterPlan<T>& plan)
      : Direct3x3Rows<T>(plan), margin(round_up(offsets[2], lanes<T>)), pitch(margin + plan.row_length) {
    contributions.resize(9 * pitch);
    sums.resize(plan.band_rows * plan.row_length);
    row_sum.resize(p.width);
  }
  explicit operator bool() const { return FilterRows<T>::operator bool() && contributions && sums && row_sum; }

  // Adds the contributions of output row Y to the sums of the source rows that the task owns.
  void add_contributions(const FilterTask& task, std::int64_t Y) {
    for (std::int64_t i = 0; i < 3; ++i) {
      const std::int64_t y = plan.source_row(Y, i, p.dilations[0]);
      if (y < task.begin || y >= task.end) continue;
      R* to = sums + (y - task.begin) * plan.row_length;
      const R* from = contributions + 3 * i * pitch + margin;
      for (std::int64_t e = 0; e < plan.expanded; e += lanes<T>)
        store(to + e, load(to + e) + load(from + e - offsets[0]) + load(from + pitch + e - offsets[1]) +
                          load(from + 2 * pitch + e - offsets[2]));
    }
  }

  std::int64_t margin, pitch;
  Buffer<R> contributions;  // [9][margin + row_length]: of an output row to each tap, with zeros around it
  Buffer<R> sums;           // [band_rows][row_length]
  Buffer<R> row_sum;        // [width]
};

// A non-temporal store where T and the alignment allow it. to: [n]
template <class T>
INR_INLINE void store_streaming(bool aligned, Vec<T> v, std::int64_t n, T* to) {
  if constexpr (sizeof(T) == sizeof(Real<T>)) {
    if (aligned) return stream_store(to, v);
  }
  store_first(v, n, to);
}

// A task owns its source rows, like in the general backward.
// grad_out: [batch, channels, out_height, out_width]; grad_x: like p.x; grad_kernel: like p.kernel, contiguous; the
// last two may be nullptr
template <bool Softmax, class T>
Status backward_direct_3x3(const ElementwiseFilter& p, const T* grad_out, T* grad_x, T* grad_kernel) {
  using R = Real<T>;
  using Worker = Direct3x3GradientRows<T>;
  const FilterPlan<T> plan(p);
  const std::int64_t width = p.out_width, area = p.out_height * width;
  const std::int64_t plane = p.kernel_strides[1], step = p.kernel_strides[3];
  const R alpha = R(p.alpha), beta = R(p.beta), gamma = R(p.gamma);
  const bool aligned =
      plan.padded_width == p.out_width && reinterpret_cast<std::uintptr_t>(grad_kernel) % vector_bytes == 0;
  return for_each_band<Worker>(plan, [&](Worker& rows, const FilterTask& task) {
    const std::int64_t channel = task.image * p.channels + task.unit;
    const std::int64_t own = plan.first_output(task.begin), end = plan.first_output(task.end);
    const std::int64_t above = grad_x ? plan.first_output(task.begin - plan.reach) : own;
    const std::int64_t below = grad_x ? plan.first_output(task.end + plan.reach) : end;
    const T* const from = grad_out + channel * area;
    T* const to = grad_kernel ? grad_kernel + channel * 9 * area : nullptr;
    if (grad_kernel) rows.stage_image(task);
    std::memset(static_cast<void*>(rows.sums), 0, std::size_t(plan.band_rows * plan.row_length) * sizeof(Real<T>));
    rows.start(task);
    for (std::int64_t Y = above; Y < below; ++Y) {
      const bool owned = grad_kernel && Y >= own && Y < end;
      const Direct3x3Taps<T> z(rows, owned ? Y : own);
      const T *const kernel = rows.row(Y), *const ahead = rows.ahead(Y), *const grad = from + Y * width;
      for (std::int64_t X = 0; X < width; X += lanes<T>) {
        const std::int64_t n = width - X;
        const TapWeights<Softmax, T> w(kernel + X * step, ahead + X * step, plane, step, n);
        const Vec<T> g = load_first(grad + X, 1, n), slope = g * w.inverse * gamma;
        if (owned) {
          Vec<T> mean{};
#pragma GCC unroll 9
          for (int t = 0; Softmax && t < 9; ++t) mean += w.tap[t] * z(t, X);
          mean *= w.inverse;
#pragma GCC unroll 9
          for (int t = 0; t < 9; ++t) {
            const Vec<T> d = slope * (z(t, X) - mean);
            store_streaming(aligned, Softmax ? d * w.tap[t] : d, n, to + t * area + Y * width + X);
          }
        }
        if (!grad_x) continue;
        R* const contribution = rows.contributions + rows.margin + X;
        const Vec<T> box = beta ? g * beta : Vec<T>{};
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) store(contribution + t * rows.pitch, slope * w.tap[t] + box);
      }
      if (grad_x) rows.add_contributions(task, Y);
    }
    for (std::int64_t y = task.begin; grad_x && y < task.end; ++y) {
      R* const sum = rows.sums + (y - task.begin) * plan.row_length;
      const std::int64_t Y = y - plan.origin_y;
      // The centre is added last: it is often the largest term and would increase the rounding errors of the sum.
      for (std::int64_t X = 0; alpha && Y >= 0 && Y < p.out_height && X < width; X += lanes<T>) {
        R* const centre = sum + rows.offsets[1] + X;
        store(centre, load(centre) + load_first(from + Y * width + X, 1, width - X) * alpha);
      }
      plan.unpad(sum, rows.row_sum, grad_x + (channel * p.height + y) * p.width);
    }
  });
}

template <class T>
Status backward_direct_3x3(const ElementwiseFilter& p, const T* grad_out, T* grad_x, T* grad_kernel) {
  return p.normalize == Normalize::none ? backward_direct_3x3<false>(p, grad_out, grad_x, grad_kernel)
                                        : backward_direct_3x3<true>(p, grad_out, grad_x, grad_kernel);
}

// FilterRows and the sums of the gradients.
//
// A task owns its source rows. It visits every output row that reads one of them, in order, and adds only to its own
// rows. Output rows that read from two bands are therefore computed twice, no thread waits for another one, and the
// sums do not depend on how the image is divided into bands.
template <class T>
class FilterGradientRows : public FilterRows<T> {
 public:
  using R = Real<T>;
  using FilterRows<T>::p;
  using FilterRows<T>::plan;
  using FilterRows<T>::offsets;
  using FilterRows<T>::taps;
  using FilterRows<T>::value;
  using FilterRows<T>::weights;

  explicit FilterGradientRows(const FilterPlan<T>& plan) : FilterRows<T>(plan) {
    sums.resize(plan.channels * plan.band_rows * plan.row_length + lanes<T>);
    gradients.resize(plan.unit_groups * p.taps() * plan.tap_stride);
    row_sum.resize(p.width);
  }
  explicit operator bool() const { return FilterRows<T>::operator bool() && sums && gradients && row_sum; }

  void clear_sums() {
    std::memset(static_cast<void*>(sums), 0, std::size_t(plan.channels * plan.band_rows * plan.row_length) * sizeof(R));
  }

  // Adds value (an output row's gradient) times the image to the gradients of the weights of row r; first: overwrites.
  void add_to_gradients(std::int64_t c, std::int64_t r, bool first) {
    R* to = gradients + (this->weights_of(c) - weights) + r * plan.padded_width;
    for (std::int64_t t = 0; t < p.taps(); ++t, to += plan.tap_stride)
      for (std::int64_t X = 0; X < plan.padded_width; X += lanes<T>) {
        const Vec<T> d = load(value + X) * load(taps[t] + X);
        store(to + X, first ? d : load(to + X) + d);
      }
  }

  // Adds value times the weights to the image's gradient, in the rows that the task owns.
  void add_to_sums(const FilterTask& task, std::int64_t c, std::int64_t Y, std::int64_t r, std::int64_t dilation) {
    const R* w = this->weights_of(c) + r * plan.padded_width;
    for (std::int64_t i = 0; i < p.kernel_height; ++i, w += p.kernel_width * plan.tap_stride) {
      const std::int64_t y = plan.source_row(Y + r, i, dilation);
      if (y < task.begin || y >= task.end) continue;
      R* to = sums + (c * plan.band_rows + y - task.begin) * plan.row_length;
      if (p.alpha && i == p.kernel_height / 2)
        add(to + offsets[p.kernel_width / 2], [&](std::int64_t) { return Vec<T>{} + R(p.alpha); });
      for (std::int64_t j = 0; j < p.kernel_width; ++j) {
        const R* tap = w + j * plan.tap_stride;
        if (p.gamma)
          add(to + offsets[j], [&](std::int64_t X) { return load(tap + X) * R(p.gamma) + R(p.beta); });
        else if (p.beta)
          add(to + offsets[j], [&](std::int64_t) { return Vec<T>{} + R(p.beta); });
      }
    }
  }

  // Writes the gradients of the logits, s (d - sum s d) for gradients d of the weights s, of the rows [begin, end).
  // to: [unit_groups * taps, out_height, out_width], from row `begin` on
  void finish_gradients(std::int64_t begin, std::int64_t end, T* to) {
    const std::int64_t n = plan.unit_groups * p.taps(), plane = p.out_height * p.out_width;
    const bool softmax = p.normalize != Normalize::none;
    const bool whole = plan.padded_width == p.out_width && reinterpret_cast<std::uintptr_t>(to) % vector_bytes == 0;
    for (std::int64_t X = begin * plan.padded_width; X < end * plan.padded_width; X += lanes<T>) {
      Vec<T> mean{};
      for (std::int64_t t = 0; softmax && t < n; ++t) mean += load(weights + t * plan.tap_stride + X) * load(at(t, X));
      for (std::int64_t t = 0; t < n; ++t) {
        const Vec<T> d = (load(at(t, X)) - mean) * R(p.gamma);
        const Vec<T> result = softmax ? d * load(weights + t * plan.tap_stride + X) : d;
        if constexpr (sizeof(T) == sizeof(R)) {
          if (whole) {
            stream_store(to + t * plane + X - begin * plan.padded_width, result);
            continue;
          }
        }
        store(at(t, X), result);
      }
    }
    if (sizeof(T) == sizeof(R) && whole) return;
    for (std::int64_t t = 0; t < n; ++t)
      for (std::int64_t r = begin; r < end; r = whole ? end : r + 1)
        unstage(at(t, r * plan.padded_width), whole ? (end - begin) * p.out_width : p.out_width,
                to + t * plane + (r - begin) * p.out_width);
  }

  Buffer<R> sums;       // [channels][band_rows][row_length]
  Buffer<R> gradients;  // [unit_groups * taps][rows_per_block][padded_width]
  Buffer<R> row_sum;    // [width]

 private:
  R* at(std::int64_t t, std::int64_t X) { return gradients + t * plan.tap_stride + X; }
  template <class F>
  void add(R* to, F factor) {
    for (std::int64_t X = 0; X < plan.padded_width; X += lanes<T>)
      store(to + X, load(to + X) + load(value + X) * factor(X));
  }
};

template <class T>
Status backward(const ElementwiseFilter& p, const T* grad_out, T* grad_x, T* grad_kernel) {
  if (is_direct_3x3(p)) return backward_direct_3x3(p, grad_out, grad_x, grad_kernel);
  const FilterPlan<T> plan(p);
  return for_each_band<FilterGradientRows<T>>(plan, [&](FilterGradientRows<T>& rows, const FilterTask& task) {
    const std::int64_t channel = task.image * p.channels + task.unit * plan.channels;
    const std::int64_t own = plan.first_output(task.begin), end = plan.first_output(task.end);
    const std::int64_t above = grad_x ? plan.first_output(task.begin - plan.reach) : own;
    const std::int64_t below = grad_x ? plan.first_output(task.end + plan.reach) : end;
    if (grad_kernel) rows.stage_image(task);
    if (grad_x) rows.clear_sums();
    for (std::int64_t Y = above; Y < below; Y += plan.rows_per_block) {
      const std::int64_t count = clamp(below - Y, 0, plan.rows_per_block);
      const std::int64_t first = clamp(own - Y, 0, count), last = clamp(end - Y, 0, count);  // owned rows
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
        plan.unpad(rows.sums + (c * plan.band_rows + y - task.begin) * plan.row_length, rows.row_sum,
                   grad_x + ((channel + c) * p.height + y) * p.width);
  });
}

}  // namespace

Status elementwise_filter_backward(Type type, const ElementwiseFilter& p, const void* grad_out, void* grad_x,
                                   void* grad_kernel) {
  large_pages(grad_x, std::size_t(p.batch * p.channels * p.height * p.width) * bytes_of(type));
  large_pages(grad_kernel, std::size_t(p.batch * p.groups * p.taps() * p.out_height * p.out_width) * bytes_of(type));
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
