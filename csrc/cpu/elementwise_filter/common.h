// Shared by the forward and the backward of elementwise_filter: the geometry, and rows staged for vector arithmetic.
//
// A task is a band of source rows of one unit: the channels of one group, or all channels if one softmax spans all
// groups. Kernel and image are staged row by row in the type that they are computed in, so that the arithmetic does not
// depend on dtypes, strides and borders. A staged image row is padded, each pixel is repeated `upscale` times, and the
// result is split into `stride` phases; then every tap reads contiguous memory for any stride and upscale.
//
// 3 x 3 kernels that no two channels share (DEAR's case) need no staging of the kernel: the nine weights of a vector of
// pixels are loaded into registers, go through the softmax there and are used at once. That path is bound by memory and
// by nine exponentials per pixel.
#pragma once

#include "../common/buffer.h"
#include "../common/tasks.h"
#include "../entries.h"

namespace inr {
namespace INR_ISA {
namespace {

// The index in [0, n) whose value the padding puts at index v; -1 for zero.
INR_INLINE std::int64_t padded_index(Padding padding, std::int64_t v, std::int64_t n) {
  if (v >= 0 && v < n) return v;
  if (padding == Padding::replicate) return v < 0 ? 0 : n - 1;
  if (padding == Padding::reflect) return v < 0 ? -v : 2 * (n - 1) - v;
  return -1;
}

// Copies and converts. from: [n] with stride `step`; to: [n]
template <class T>
INR_INLINE void stage(const T* from, std::int64_t step, std::int64_t n, Real<T>* to) {
  if (step == 1)
    for (std::int64_t i = 0; i < n; ++i) to[i] = to_real(from[i]);
  else
    for (std::int64_t i = 0; i < n; ++i) to[i] = to_real(from[i * step]);
}

// from, to: [n]
template <class T>
INR_INLINE void unstage(const Real<T>* from, std::int64_t n, T* to) {
  for (std::int64_t i = 0; i < n; ++i) from_real(from[i], to + i);
}

struct FilterTask {
  std::int64_t image, unit, begin, end;  // source rows
};

// How the problem is divided into tasks, and where the taps are.
template <class T>
struct FilterPlan {
  explicit FilterPlan(const ElementwiseFilter& problem) : p(problem) {
    for (std::int64_t i = 0; i < p.dilation_count; ++i) longest = p.dilations[i] > longest ? p.dilations[i] : longest;
    reach = p.kernel_height / 2 * longest;
    const std::int64_t reach_x = p.kernel_width / 2 * longest;
    const bool valid = p.padding == Padding::valid;
    origin_y = valid ? reach : 0;
    origin_x = reach_x;
    halo = valid ? 0 : reach_x;
    padded_width = round_up(p.out_width, lanes<T>);
    rows_per_block = clamp(512 / padded_width, 1, p.out_height);
    tap_stride = rows_per_block * padded_width;
    expanded = (p.width + 2 * halo) * p.upscale;
    phase = round_up((expanded + p.stride - 1) / p.stride + lanes<T>, lanes<T>);
    row_length = phase * p.stride;
    source_column.resize(row_length);
    for (std::int64_t e = 0; source_column && e < row_length; ++e)
      source_column[e % p.stride * phase + e / p.stride] =
          e < expanded ? padded_index(p.padding, e / p.upscale - halo, p.width) : -1;
    const bool all = p.normalize == Normalize::all;
    unit_groups = all ? p.groups : 1;
    units = all ? 1 : p.groups;
    channels = p.channels / units;
    divide();
  }

  // Chooses bands that fit into the second-level cache, and enough of them for the threads.
  void divide() {
    const double bytes = double(p.batch) * double(sizeof(T)) *
                         (double(p.groups * p.taps()) * double(p.out_height * p.out_width) +
                          double(p.channels) * double(p.height * p.width));
    threads = int(clamp(std::int64_t(bytes / (128 << 10)) + 1, 1, p.threads));
    const std::int64_t min_rows = clamp(2 * reach, 4, p.height < 4 ? 4 : p.height);
    const std::int64_t cache_rows = (384 << 10) / (channels * row_length * std::int64_t(sizeof(Real<T>))) - 2 * reach;
    const std::int64_t min_bands = threads > 1 ? (8 * threads + p.batch * units - 1) / (p.batch * units) : 1;
    const std::int64_t thread_rows = (p.height + min_bands - 1) / min_bands;
    band_rows = clamp(cache_rows < thread_rows ? cache_rows : thread_rows, min_rows,
                      p.height > min_rows ? p.height : min_rows);
    bands = (p.height + band_rows - 1) / band_rows;
    staged_rows = band_rows + 2 * reach;
  }

  std::int64_t tasks() const { return p.batch * units * bands; }
  FilterTask task(std::int64_t i) const {
    const std::int64_t begin = i % bands * band_rows;
    return {i / bands / units, i / bands % units, begin, clamp(begin + band_rows, 0, p.height)};
  }

  // The first output row that is centred on source row y or below.
  std::int64_t first_output(std::int64_t y) const {
    const std::int64_t above = clamp(y - origin_y, 0, p.height) * p.upscale;
    return clamp((above + p.stride - 1) / p.stride, 0, p.out_height);
  }
  std::int64_t centre_row(std::int64_t Y) const { return (plain() ? Y : Y * p.stride / p.upscale) + origin_y; }
  std::int64_t source_row(std::int64_t Y, std::int64_t i, std::int64_t dilation) const {
    return padded_index(p.padding, centre_row(Y) + (i - p.kernel_height / 2) * dilation, p.height);
  }
  // The offset in a staged row of tap column j for output column 0; for output column X add X.
  std::int64_t tap_offset(std::int64_t j, std::int64_t dilation) const {
    const std::int64_t e = (origin_x + (j - p.kernel_width / 2) * dilation) * p.upscale;
    return e % p.stride * phase + e / p.stride;
  }

  bool plain() const { return p.stride == 1 && p.upscale == 1; }
  // Stages a row. x: [width]; to: [row_length]
  void pad(const T* x, Real<T>* to) const {
    if (plain()) stage(x, 1, p.width, to + halo);
    for (std::int64_t i = next(-1); i < filled(); i = next(i))
      to[i] = source_column[i] < 0 ? Real<T>(0) : to_real(x[source_column[i]]);
  }
  // The gradient of a row from that of the staged row. from: [row_length]; sum: [width], a work buffer; x: [width]
  void unpad(const Real<T>* from, Real<T>* sum, T* x) const {
    if (plain())
      std::memcpy(sum, from + halo, std::size_t(p.width) * sizeof(Real<T>));
    else
      std::memset(static_cast<void*>(sum), 0, std::size_t(p.width) * sizeof(Real<T>));
    for (std::int64_t i = next(-1); i < filled(); i = next(i))
      if (source_column[i] >= 0) sum[source_column[i]] += from[i];
    unstage(sum, p.width, x);
  }

  const ElementwiseFilter& p;
  std::int64_t longest = 0, reach;       // the longest dilation; rows between a tap and the centre, at most
  std::int64_t origin_y, origin_x;       // of output (0, 0), in the image's rows and in a staged row
  std::int64_t halo;                     // padding columns on each side of a staged row
  std::int64_t padded_width;             // out_width in whole vectors
  std::int64_t expanded;                 // length of a padded and repeated image row
  std::int64_t phase, row_length;        // lengths of one phase of a staged image row, and of all of them
  std::int64_t rows_per_block;           // output rows whose weights are staged together, to read memory in long runs
  std::int64_t tap_stride;               // between the staged weights of two taps: rows_per_block * padded_width
  std::int64_t unit_groups, units, channels;  // groups of a unit, units of an image, channels of a unit
  std::int64_t band_rows, bands;              // source rows of a task, tasks of a unit
  std::int64_t staged_rows;                   // source rows that a task reads
  int threads;
  Buffer<std::int64_t> source_column;  // [row_length]: the image column of a staged element; -1: zero

 private:
  // The next staged element that the fast path does not copy: without stride and upscale, those of the borders.
  std::int64_t next(std::int64_t i) const { return plain() && i + 1 == halo ? halo + p.width : i + 1; }
  std::int64_t filled() const { return plain() ? expanded : row_length; }
};

// The staged rows of one thread.
template <class T>
class FilterRows {
 public:
  using R = Real<T>;

  INR_NOINLINE explicit FilterRows(const FilterPlan<T>& plan) : plan(plan), p(plan.p) {
    image.resize((plan.channels * plan.staged_rows + 1) * plan.row_length + lanes<T>);
    weights.resize(plan.unit_groups * p.taps() * plan.tap_stride);
    value.resize(plan.padded_width);
    taps.resize(p.taps());
    offsets.resize(p.kernel_width);
  }
  explicit operator bool() const { return image && weights && value && taps && offsets; }

  // Stages the image rows that the taps of a task read.
  INR_NOINLINE void stage_image(const FilterTask& task) {
    first_row = clamp(task.begin - plan.reach, 0, p.height);
    const std::int64_t high = clamp(task.end + plan.reach, 0, p.height);
    const std::int64_t channel = task.image * p.channels + task.unit * plan.channels;
    const T* x = static_cast<const T*>(p.x) + channel * p.height * p.width;
    for (std::int64_t c = 0; c < plan.channels; ++c)
      for (std::int64_t y = first_row; y < high; ++y)
        plan.pad(x + (c * p.height + y) * p.width, image + (c * plan.staged_rows + y - first_row) * plan.row_length);
  }

  // Stages the weights of the output rows [Y, Y + count), after the softmax.
  INR_NOINLINE void stage_weights(const FilterTask& task, std::int64_t Y, std::int64_t count) {
    const std::int64_t n = plan.unit_groups * p.taps(), *strides = p.kernel_strides;
    const T* kernel = static_cast<const T*>(p.kernel) + task.image * strides[0] + task.unit * n * strides[1];
    const bool whole = plan.padded_width == p.out_width && strides[2] == p.out_width * strides[3];
    for (std::int64_t t = 0; t < n; ++t) {
      const T* from = kernel + t * strides[1] + Y * strides[2];
      R* to = weights + t * plan.tap_stride;
      if (whole)
        stage(from, strides[3], count * p.out_width, to);
      else
        for (std::int64_t r = 0; r < count; ++r)
          stage(from + r * strides[2], strides[3], p.out_width, to + r * plan.padded_width);
    }
    if (p.normalize == Normalize::none) return;
    // Prefetches the next rows, of this unit or the next one, during the softmax.
    const bool more = plan.first_output(task.end) > Y + count;
    const T* ahead = more ? kernel + (Y + count) * strides[2] : kernel + n * strides[1];
    for (std::int64_t X = 0; X < count * plan.padded_width; X += lanes<T>) {
      for (std::int64_t t = 0; whole && t < n; ++t) __builtin_prefetch(ahead + t * strides[1] + X, 0, 2);
      softmax(weights + X, n);
    }
  }

  // The staged row of channel c that tap row i of output row Y reads: [row_length].
  const R* tap_row(std::int64_t c, std::int64_t Y, std::int64_t i, std::int64_t dilation) const {
    const std::int64_t y = plan.source_row(Y, i, dilation);
    return image + (y < 0 ? plan.channels * plan.staged_rows : c * plan.staged_rows + y - first_row) * plan.row_length;
  }
  // Sets taps[t] to where tap t of output row Y reads channel c.
  void find_taps(std::int64_t c, std::int64_t Y, std::int64_t dilation) {
    for (std::int64_t i = 0, t = 0; i < p.kernel_height; ++i) {
      const R* row = tap_row(c, Y, i, dilation);
      for (std::int64_t j = 0; j < p.kernel_width; ++j, ++t) taps[t] = row + offsets[j];
    }
  }
  void find_offsets(std::int64_t dilation) {
    for (std::int64_t j = 0; j < p.kernel_width; ++j) offsets[j] = plan.tap_offset(j, dilation);
  }

  // The staged weights of channel c's group: [taps][rows_per_block][padded_width].
  const R* weights_of(std::int64_t c) const {
    return weights + c * plan.unit_groups / plan.channels * p.taps() * plan.tap_stride;
  }

  const FilterPlan<T>& plan;
  const ElementwiseFilter& p;
  Buffer<R> image;               // [channels][staged_rows][row_length], then a row of zeros
  Buffer<R> weights;             // [unit_groups * taps][rows_per_block][padded_width]
  Buffer<R> value;               // [padded_width]: an output row, or its gradient
  Buffer<const R*> taps;         // [taps]
  Buffer<std::int64_t> offsets;  // [kernel_width]
  std::int64_t first_row = 0;    // of the source rows in `image`

 private:
  // Softmax over n taps for a vector of pixels. w: [n][lanes] with row stride tap_stride
  void softmax(R* w, std::int64_t n) {
    Vec<T> maximum{}, sum{};
    for (std::int64_t t = 0; t < n; ++t) {
      Vec<T> v = load(w + t * plan.tap_stride);
      if (p.log_window) store(w + t * plan.tap_stride, v += R(p.log_window[t % p.taps()]));
      maximum = t == 0 ? v : (v > maximum ? v : maximum);
    }
    for (std::int64_t t = 0; t < n; ++t) {
      const Vec<T> e = exp_negative(load(w + t * plan.tap_stride) - maximum);
      store(w + t * plan.tap_stride, e);
      sum += e;
    }
    sum = R(1) / sum;
    for (std::int64_t t = 0; t < n; ++t) store(w + t * plan.tap_stride, load(w + t * plan.tap_stride) * sum);
  }
};

// Calls work(rows, task) for every task; each thread has its own rows, of type Worker.
template <class Worker, class T, class F>
Status for_each_band(const FilterPlan<T>& plan, F&& work) {
  if (!plan.source_column) return Status::out_of_memory;
  const std::int64_t run = plan.tasks() / (8 * plan.threads) + 1;  // consecutive tasks, adjacent in memory, per thread
  return for_each_task(
      plan.threads, (plan.tasks() + run - 1) / run, [&] { return Worker(plan); },
      [&](Worker& rows, std::int64_t i) {
        for (std::int64_t t = i * run; t < clamp((i + 1) * run, 0, plan.tasks()); ++t) work(rows, plan.task(t));
        stream_fence();
        return Status::ok;
      });
}

// ---- 3 x 3 kernels

// Whether the weights can be used without staging them.
INR_INLINE bool is_direct_3x3(const ElementwiseFilter& p) {
  return p.kernel_height == 3 && p.kernel_width == 3 && p.groups == p.channels && p.dilation_count == 1 &&
         p.stride == 1 && p.upscale == 1 && p.gamma && !p.log_window &&
         (p.normalize != Normalize::all || p.groups == 1);
}

// The first min(n, lanes) elements; load_first sets the other lanes to zero.
// from: [n] with stride `step`; to: [n]
template <class T>
INR_INLINE Vec<T> load_first(const T* from, std::int64_t step, std::int64_t n) {
  if (step == 1) return n < lanes<T> ? load_part(from, n) : load(from);
  Real<T> v[lanes<T>] = {};
  stage(from, step, n < lanes<T> ? n : lanes<T>, v);
  return load(v);
}
template <class T>
INR_INLINE void store_first(Vec<T> v, std::int64_t n, T* to) {
  n < lanes<T> ? store_part(to, v, n) : store(to, v);
}

// The nine weights of a vector of pixels, before they are divided by their sum; `inverse`: 1 / sum.
template <bool Softmax, class T>
struct TapWeights {
  // kernel: [9, n] with strides plane, step; n: pixels left in the row; ahead: like kernel, to be prefetched
  [[gnu::always_inline]] TapWeights(const T* kernel, const T* ahead, std::int64_t plane, std::int64_t step,
                                 std::int64_t n) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) __builtin_prefetch(ahead + t * plane, 0, 2);
    if (step == 1 && n >= lanes<T>)
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) tap[t] = load(kernel + t * plane);
    else
#pragma GCC unroll 1
      for (int t = 0; t < 9; ++t) tap[t] = load_first(kernel + t * plane, step, n);
    inverse = Vec<T>{} + Real<T>(1);
    if (!Softmax) return;
    Vec<T> maximum = tap[0], sum{};
#pragma GCC unroll 9
    for (int t = 1; t < 9; ++t) maximum = tap[t] > maximum ? tap[t] : maximum;
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) sum += tap[t] = exp_negative(tap[t] - maximum);
    inverse /= sum;
  }
  Vec<T> tap[9], inverse;
};

// Where the taps of an output row read: tap t of column X at row[t / 3][t % 3 * dilation + X].
template <class T>
struct Direct3x3Taps {
  Direct3x3Taps(const FilterRows<T>& rows, std::int64_t Y) : dilation(rows.p.dilations[0]) {
    for (int i = 0; i < 3; ++i) row[i] = rows.tap_row(0, Y, i, dilation) + rows.offsets[0];
  }
  [[gnu::always_inline]] Vec<T> operator()(int t, std::int64_t X) const {
    return load(row[t / 3] + t % 3 * dilation + X);
  }
  const Real<T>* row[3];  // [row_length] each, from the first tap of column 0
  const std::int64_t dilation;
};

// FilterRows with the kernel of the task's channel, which is read from memory without staging.
template <class T>
class Direct3x3Rows : public FilterRows<T> {
 public:
  using FilterRows<T>::p;
  using FilterRows<T>::plan;

  explicit Direct3x3Rows(const FilterPlan<T>& plan) : FilterRows<T>(plan) { this->find_offsets(p.dilations[0]); }

  void start(const FilterTask& task) {
    const std::int64_t* strides = p.kernel_strides;
    kernel = static_cast<const T*>(p.kernel) + task.image * strides[0] + task.unit * 9 * strides[1];
    prefetch_rows = clamp(512 / p.out_width, 1, p.out_height);
  }
  // The kernel at output row Y: [9, out_width] with strides 1 and 3 of kernel_strides.
  const T* row(std::int64_t Y) const { return kernel + Y * p.kernel_strides[2]; }
  // The kernel `prefetch_rows` rows later; after the last row follows the next channel.
  const T* ahead(std::int64_t Y) const {
    const std::int64_t y = Y + prefetch_rows;
    return y < p.out_height ? row(y) : row(y - p.out_height) + 9 * p.kernel_strides[1];
  }

  const T* kernel;  // [9, out_height, out_width] with strides 1 to 3 of kernel_strides
  std::int64_t prefetch_rows;
};

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
