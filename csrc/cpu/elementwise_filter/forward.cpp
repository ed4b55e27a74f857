#include "../../common/pages.h"
#include "common.h"

namespace inr {
namespace INR_ISA {
namespace {

// out: [batch, channels, out_height, out_width]
template <bool Softmax, bool Box, class T>
Status forward_direct_3x3(const ElementwiseFilter& p, T* out) {
  using R = Real<T>;
  const FilterPlan<T> plan(p);
  return for_each_band<Direct3x3Rows<T>>(plan, [&](Direct3x3Rows<T>& rows, const FilterTask& task) {
    const std::int64_t width = p.out_width, plane = p.kernel_strides[1], step = p.kernel_strides[3];
    const R alpha = R(p.alpha), beta = R(p.beta), gamma = R(p.gamma);
    T* const to = out + (task.image * p.channels + task.unit) * p.out_height * width;
    rows.stage_image(task);
    rows.start(task);
    for (std::int64_t Y = plan.first_output(task.begin); Y < plan.first_output(task.end); ++Y) {
      const Direct3x3Taps<T> z(rows, Y);
      const T *const kernel = rows.row(Y), *const ahead = rows.ahead(Y);
      for (std::int64_t X = 0; X < width; X += lanes<T>) {
        const TapWeights<Softmax, T> w(kernel + X * step, ahead + X * step, plane, step, width - X);
        Vec<T> sum{}, box{};
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) sum += w.tap[t] * z(t, X);
        sum *= w.inverse * gamma;
        for (int t = 0; Box && t < 9; ++t) box += z(t, X);
        if (Box) sum += box * beta;
        if (alpha) sum += z(4, X) * alpha;
        store_first(sum, width - X, to + Y * width + X);
      }
    }
  });
}

template <class T>
Status forward_direct_3x3(const ElementwiseFilter& p, T* out) {
  if (p.normalize == Normalize::none)
    return p.beta ? forward_direct_3x3<false, true>(p, out) : forward_direct_3x3<false, false>(p, out);
  return p.beta ? forward_direct_3x3<true, true>(p, out) : forward_direct_3x3<true, false>(p, out);
}
// Filters N vectors of an output row from column X on. w: [taps][padded_width] with row stride tap_stride
template <int N, bool Box, class T>
INR_INLINE void filter(const FilterRows<T>& rows, const Real<T>* w, std::int64_t X) {
  using R = Real<T>;
  const ElementwiseFilter& p = rows.p;
  const std::int64_t count = p.gamma || Box ? p.taps() : 0;
  const R* const* taps = rows.taps;
  Vec<T> sum[N]{}, box[N]{};
  for (std::int64_t t = 0; t < count; ++t)
    for (int n = 0; n < N; ++n) {
      const Vec<T> z = load(taps[t] + X + n * lanes<T>);
      sum[n] += load(w + t * rows.plan.tap_stride + X + n * lanes<T>) * z;
      if (Box) box[n] += z;
    }
  for (int n = 0; n < N; ++n) {
    Vec<T> out = p.gamma ? sum[n] * R(p.gamma) : Vec<T>{};
    if (Box) out += box[n] * R(p.beta);
    if (p.alpha) out += load(taps[p.taps() / 2] + X + n * lanes<T>) * R(p.alpha);
    store(rows.value + X + n * lanes<T>, out);
  }
}

// w: [taps][padded_width] with row stride tap_stride
template <bool Box, class T>
void filter_row(const FilterRows<T>& rows, const Real<T>* w) {
  std::int64_t X = 0;
  for (; X + 4 * lanes<T> <= rows.plan.padded_width; X += 4 * lanes<T>) filter<4, Box>(rows, w, X);
  for (; X < rows.plan.padded_width; X += lanes<T>) filter<1, Box>(rows, w, X);
}

// out: [dilation_count, batch, channels, out_height, out_width]
template <class T>
Status forward(const ElementwiseFilter& p, T* out) {
  if (is_direct_3x3(p)) return forward_direct_3x3(p, out);
  const FilterPlan<T> plan(p);
  return for_each_band<FilterRows<T>>(plan, [&](FilterRows<T>& rows, const FilterTask& task) {
    const std::int64_t last = plan.first_output(task.end);
    const std::int64_t channel = task.image * p.channels + task.unit * plan.channels;
    rows.stage_image(task);
    for (std::int64_t Y = plan.first_output(task.begin); Y < last; Y += plan.rows_per_block) {
      const std::int64_t count = clamp(last - Y, 0, plan.rows_per_block);
      if (p.gamma) rows.stage_weights(task, Y, count);
      for (std::int64_t i = 0; i < p.dilation_count; ++i) {
        rows.find_offsets(p.dilations[i]);
        for (std::int64_t c = 0; c < plan.channels; ++c)
          for (std::int64_t r = 0; r < count; ++r) {
            rows.find_taps(c, Y + r, p.dilations[i]);
            const Real<T>* w = rows.weights_of(c) + r * plan.padded_width;
            p.beta ? filter_row<true>(rows, w) : filter_row<false>(rows, w);
            const std::int64_t plane = i * p.batch * p.channels + channel + c;
            unstage(rows.value, p.out_width, out + (plane * p.out_height + Y + r) * p.out_width);
          }
      }
    }
  });
}

}  // namespace

Status elementwise_filter_forward(Type type, const ElementwiseFilter& p, void* out) {
  large_pages(out, std::size_t(p.dilation_count * p.batch * p.channels * p.out_height * p.out_width) * bytes_of(type));
  switch (type) {
    case Type::float32: return forward(p, static_cast<float*>(out));
    case Type::float64: return forward(p, static_cast<double*>(out));
    case Type::bfloat16: return forward(p, static_cast<bf16*>(out));
    case Type::float16: return forward(p, static_cast<f16*>(out));
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
