// elementwise_filter with 3 x 3 taps of a kernel that no two channels share: nothing to stage but the image.
//
// The nine weights of a vector of pixels go from memory to registers, there through the softmax, and are used at once.
// DEAR's case, bound by memory and by nine exponentials a pixel.
#pragma once

#include "elementwise_filter.h"

namespace inr {
namespace INR_ISA {
namespace {

INR_INLINE bool is_direct(const ElementwiseFilter& p) {
  return p.kernel_height == 3 && p.kernel_width == 3 && p.groups == p.channels && p.dilation_count == 1 &&
         p.stride == 1 && p.upscale == 1 && p.gamma && !p.log_window &&
         (p.normalize != Normalize::all || p.groups == 1);
}

// The first n of a vector's elements, zeros behind them.
template <class T>
INR_INLINE Vec<T> fetch(const T* from, std::int64_t step, std::int64_t n) {
  if (step == 1) return n < lanes<T> ? load_part(from, n) : load(from);
  Real<T> v[lanes<T>] = {};
  stage(from, step, n < lanes<T> ? n : lanes<T>, v);
  return load(v);
}
template <class T>
INR_INLINE void put(Vec<T> v, std::int64_t n, T* to) {
  n < lanes<T> ? store_part(to, v, n) : store(to, v);
}

// Past the caches, where T and the address allow it.
template <class T>
INR_INLINE void put_past(bool whole, Vec<T> v, std::int64_t n, T* to) {
  if constexpr (sizeof(T) == sizeof(Real<T>)) {
    if (whole) return stream(to, v);
  }
  put(v, n, to);
}

// The weights of a vector of pixels, before they are divided by their sum; `inverse`: 1 / sum.
template <bool Softmax, class T>
struct Weights {
  // plane, step: strides of the kernel's taps and columns; n: pixels left in the row; ahead: what is soon to be read
  [[gnu::always_inline]] Weights(const T* kernel, const T* ahead, std::int64_t plane, std::int64_t step,
                                 std::int64_t n) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) __builtin_prefetch(ahead + t * plane, 0, 2);
    if (step == 1 && n >= lanes<T>)
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) tap[t] = load(kernel + t * plane);
    else
#pragma GCC unroll 1
      for (int t = 0; t < 9; ++t) tap[t] = fetch(kernel + t * plane, step, n);
    inverse = Vec<T>{} + Real<T>(1);
    if (!Softmax) return;
    Vec<T> most = tap[0], sum{};
#pragma GCC unroll 9
    for (int t = 1; t < 9; ++t) most = tap[t] > most ? tap[t] : most;
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) sum += tap[t] = exp_negative(tap[t] - most);
    inverse /= sum;
  }
  Vec<T> tap[9], inverse;
};

// Where the taps of an output row read: tap t of column X at row[t / 3] + t % 3 * dilation + X.
template <class T>
struct TapRows {
  TapRows(const Rows<T>& rows, std::int64_t Y) : dilation(rows.p.dilations[0]) {
    for (int i = 0; i < 3; ++i) row[i] = rows.tap_row(0, Y, i, dilation) + rows.offsets[0];
  }
  [[gnu::always_inline]] Vec<T> operator()(int t, std::int64_t X) const {
    return load(row[t / 3] + t % 3 * dilation + X);
  }
  const Real<T>* row[3];
  const std::int64_t dilation;
};

// Rows, and the kernel of the channel that they belong to.
template <class T>
class DirectRows : public Rows<T> {
 public:
  using R = Real<T>;
  using Rows<T>::p;
  using Rows<T>::plan;
  using Rows<T>::offsets;

  explicit DirectRows(const Plan<T>& plan, bool gradients = false) : Rows<T>(plan) {
    this->find_offsets(p.dilations[0]);
    if (!gradients) return;
    margin = round_up(offsets[2], lanes<T>);
    pitch = margin + plan.row;
    shares.resize(9 * pitch);
    sums.resize(plan.band_rows * plan.row);
    line.resize(p.width);
  }

  void start(const Task& task) {
    const std::int64_t* strides = p.kernel_strides;
    kernel = static_cast<const T*>(p.kernel) + task.image * strides[0] + task.unit * 9 * strides[1];
    lead = clamp(512 / p.out_width, 1, p.out_height);
  }
  const T* row(std::int64_t Y) const { return kernel + Y * p.kernel_strides[2]; }
  // The kernel's row some rows after Y: the next channel's follow the last.
  const T* ahead(std::int64_t Y) const {
    const std::int64_t y = Y + lead;
    return y < p.out_height ? row(y) : row(y - p.out_height) + 9 * p.kernel_strides[1];
  }

  // shares -> sums, of the rows that the task owns
  void add_shares(const Task& task, std::int64_t Y) {
    for (std::int64_t i = 0; i < 3; ++i) {
      const std::int64_t y = plan.source_row(Y, i, p.dilations[0]);
      if (y < task.begin || y >= task.end) continue;
      R* to = sums + (y - task.begin) * plan.row;
      const R* from = shares + 3 * i * pitch + margin;
      for (std::int64_t e = 0; e < plan.expanded; e += lanes<T>)
        store(to + e, load(to + e) + load(from + e - offsets[0]) + load(from + pitch + e - offsets[1]) +
                          load(from + 2 * pitch + e - offsets[2]));
    }
  }

  const T* kernel;
  std::int64_t lead, margin = 0, pitch = 0;
  Buffer<R> shares;  // [9][margin + row] what an output row gives each of its taps; zeros around it
  Buffer<R> sums;    // [band_rows][row]
  Buffer<R> line;    // [width]
};

template <bool Softmax, bool Box, class T>
Status forward_direct(const ElementwiseFilter& p, T* out) {
  using R = Real<T>;
  const Plan<T> plan(p);
  return for_each_band<DirectRows<T>>(plan, [&](DirectRows<T>& rows, const Task& task) {
    const std::int64_t width = p.out_width, plane = p.kernel_strides[1], step = p.kernel_strides[3];
    const R alpha = R(p.alpha), beta = R(p.beta), gamma = R(p.gamma);
    T* const to = out + (task.image * p.channels + task.unit) * p.out_height * width;
    rows.stage_image(task);
    rows.start(task);
    for (std::int64_t Y = plan.first_output(task.begin); Y < plan.first_output(task.end); ++Y) {
      const TapRows<T> z(rows, Y);
      const T *const kernel = rows.row(Y), *const ahead = rows.ahead(Y);
      for (std::int64_t X = 0; X < width; X += lanes<T>) {
        const Weights<Softmax, T> w(kernel + X * step, ahead + X * step, plane, step, width - X);
        Vec<T> sum{}, box{};
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) sum += w.tap[t] * z(t, X);
        sum *= w.inverse * gamma;
        for (int t = 0; Box && t < 9; ++t) box += z(t, X);
        if (Box) sum += box * beta;
        if (alpha) sum += z(4, X) * alpha;
        put(sum, width - X, to + Y * width + X);
      }
    }
  });
}

// A task owns its source rows, as in the general backward.
template <bool Softmax, class T>
Status backward_direct(const ElementwiseFilter& p, const T* grad_out, T* grad_x, T* grad_kernel) {
  struct Worker : DirectRows<T> {
    explicit Worker(const Plan<T>& plan) : DirectRows<T>(plan, true) {}
    explicit operator bool() const { return Rows<T>::operator bool() && this->shares && this->sums && this->line; }
  };
  using R = Real<T>;
  const Plan<T> plan(p);
  const std::int64_t width = p.out_width, area = p.out_height * width;
  const std::int64_t plane = p.kernel_strides[1], step = p.kernel_strides[3];
  const R alpha = R(p.alpha), beta = R(p.beta), gamma = R(p.gamma);
  const bool whole = plan.padded == p.out_width && reinterpret_cast<std::uintptr_t>(grad_kernel) % vector_bytes == 0;
  return for_each_band<Worker>(plan, [&](Worker& rows, const Task& task) {
    const std::int64_t channel = task.image * p.channels + task.unit;
    const std::int64_t own = plan.first_output(task.begin), end = plan.first_output(task.end);
    const std::int64_t above = grad_x ? plan.first_output(task.begin - plan.reach) : own;
    const std::int64_t below = grad_x ? plan.first_output(task.end + plan.reach) : end;
    const T* const from = grad_out + channel * area;
    T* const to = grad_kernel ? grad_kernel + channel * 9 * area : nullptr;
    if (grad_kernel) rows.stage_image(task);
    std::memset(static_cast<void*>(rows.sums), 0, std::size_t(plan.band_rows * plan.row) * sizeof(Real<T>));
    rows.start(task);
    for (std::int64_t Y = above; Y < below; ++Y) {
      const bool owned = grad_kernel && Y >= own && Y < end;
      const TapRows<T> z(rows, owned ? Y : own);
      const T *const kernel = rows.row(Y), *const ahead = rows.ahead(Y), *const grad = from + Y * width;
      for (std::int64_t X = 0; X < width; X += lanes<T>) {
        const std::int64_t n = width - X;
        const Weights<Softmax, T> w(kernel + X * step, ahead + X * step, plane, step, n);
        const Vec<T> g = fetch(grad + X, 1, n), slope = g * w.inverse * gamma;
        if (owned) {
          Vec<T> mean{};
#pragma GCC unroll 9
          for (int t = 0; Softmax && t < 9; ++t) mean += w.tap[t] * z(t, X);
          mean *= w.inverse;
#pragma GCC unroll 9
          for (int t = 0; t < 9; ++t) {
            const Vec<T> d = slope * (z(t, X) - mean);
            put_past(whole, Softmax ? d * w.tap[t] : d, n, to + t * area + Y * width + X);
          }
        }
        if (!grad_x) continue;
        R* const share = rows.shares + rows.margin + X;
        const Vec<T> box = beta ? g * beta : Vec<T>{};
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) store(share + t * rows.pitch, slope * w.tap[t] + box);
      }
      if (grad_x) rows.add_shares(task, Y);
    }
    for (std::int64_t y = task.begin; grad_x && y < task.end; ++y) {
      R* const sum = rows.sums + (y - task.begin) * plan.row;
      const std::int64_t Y = y - plan.origin_y;
      // The centre comes last: often the largest term, it would round every sum that it stood in.
      for (std::int64_t X = 0; alpha && Y >= 0 && Y < p.out_height && X < width; X += lanes<T>) {
        R* const centre = sum + rows.offsets[1] + X;
        store(centre, load(centre) + fetch(from + Y * width + X, 1, width - X) * alpha);
      }
      plan.unpad(sum, rows.line, grad_x + (channel * p.height + y) * p.width);
    }
  });
}

template <class T>
Status forward_direct(const ElementwiseFilter& p, T* out) {
  if (p.normalize == Normalize::none)
    return p.beta ? forward_direct<false, true>(p, out) : forward_direct<false, false>(p, out);
  return p.beta ? forward_direct<true, true>(p, out) : forward_direct<true, false>(p, out);
}
template <class T>
Status backward_direct(const ElementwiseFilter& p, const T* grad_out, T* grad_x, T* grad_kernel) {
  return p.normalize == Normalize::none ? backward_direct<false>(p, grad_out, grad_x, grad_kernel)
                                        : backward_direct<true>(p, grad_out, grad_x, grad_kernel);
}

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
