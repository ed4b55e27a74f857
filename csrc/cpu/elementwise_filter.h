// What the forward and the backward kernels of elementwise_filter share: the geometry, and rows staged for vectors.
//
// A task is a band of source rows of one unit: a group of channels, or all of them where one softmax spans all groups.
// Kernel and image are staged row by row in the type that they are computed in, so the arithmetic below knows
// neither dtypes nor strides nor borders. A staged image row is padded, each pixel repeated `upscale` times and the
// result dealt out to `stride` phases: then every tap reads contiguous memory, whatever the geometry.
#pragma once

#include "buffer.h"
#include "kernels.h"
#include "tasks.h"

namespace inr {
namespace INR_ISA {
namespace {

// The pixel that stands at v of n, -1 for a zero.
INR_INLINE std::int64_t fold(Padding padding, std::int64_t v, std::int64_t n) {
  if (v >= 0 && v < n) return v;
  if (padding == Padding::replicate) return v < 0 ? 0 : n - 1;
  if (padding == Padding::reflect) return v < 0 ? -v : 2 * (n - 1) - v;
  return -1;
}

template <class T>
INR_INLINE void stage(const T* from, std::int64_t step, std::int64_t n, Real<T>* to) {
  if (step == 1)
    for (std::int64_t i = 0; i < n; ++i) to[i] = to_real(from[i]);
  else
    for (std::int64_t i = 0; i < n; ++i) to[i] = to_real(from[i * step]);
}

template <class T>
INR_INLINE void unstage(const Real<T>* from, std::int64_t n, T* to) {
  for (std::int64_t i = 0; i < n; ++i) from_real(from[i], to + i);
}

struct Task {
  std::int64_t image, unit, begin, end;  // source rows
};

// How a problem is cut, and where its taps lie.
template <class T>
struct Plan {
  explicit Plan(const ElementwiseFilter& problem) : p(problem) {
    for (std::int64_t i = 0; i < p.dilation_count; ++i) longest = p.dilations[i] > longest ? p.dilations[i] : longest;
    reach = p.kernel_height / 2 * longest;
    const std::int64_t reach_x = p.kernel_width / 2 * longest;
    const bool valid = p.padding == Padding::valid;
    origin_y = valid ? reach : 0;
    origin_x = reach_x;  // in the staged row, whose padding is `halo` wide
    halo = valid ? 0 : reach_x;
    padded = round_up(p.out_width, lanes<T>);
    block = clamp(512 / padded, 1, p.out_height);
    line = block * padded;
    expanded = (p.width + 2 * halo) * p.upscale;
    phase = round_up((expanded + p.stride - 1) / p.stride + lanes<T>, lanes<T>);
    row = phase * p.stride;
    column.resize(row);
    for (std::int64_t e = 0; column && e < row; ++e)
      column[e % p.stride * phase + e / p.stride] =
          e < expanded ? fold(p.padding, e / p.upscale - halo, p.width) : -1;
    const bool all = p.normalize == Normalize::all;
    unit_groups = all ? p.groups : 1;
    units = all ? 1 : p.groups;
    channels = p.channels / units;
    cut();
  }

  // Bands that fit the second-level cache, and enough of them for the threads.
  void cut() {
    const double bytes = double(p.batch) * double(sizeof(T)) *
                         (double(p.groups * p.taps()) * double(p.out_height * p.out_width) +
                          double(p.channels) * double(p.height * p.width));
    threads = int(clamp(std::int64_t(bytes / (128 << 10)) + 1, 1, p.threads));
    const std::int64_t least = clamp(2 * reach, 4, p.height < 4 ? 4 : p.height);
    const std::int64_t fits = (384 << 10) / (channels * row * std::int64_t(sizeof(Real<T>))) - 2 * reach;
    const std::int64_t wanted = threads > 1 ? (8 * threads + p.batch * units - 1) / (p.batch * units) : 1;
    const std::int64_t share = (p.height + wanted - 1) / wanted;
    band_rows = clamp(fits < share ? fits : share, least, p.height > least ? p.height : least);
    bands = (p.height + band_rows - 1) / band_rows;
    held = band_rows + 2 * reach;
  }

  std::int64_t tasks() const { return p.batch * units * bands; }
  Task task(std::int64_t i) const {
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
    return fold(p.padding, centre_row(Y) + (i - p.kernel_height / 2) * dilation, p.height);
  }
  // Where in a staged row tap column j of output column 0 lies; column X lies X further.
  std::int64_t tap_offset(std::int64_t j, std::int64_t dilation) const {
    const std::int64_t e = (origin_x + (j - p.kernel_width / 2) * dilation) * p.upscale;
    return e % p.stride * phase + e / p.stride;
  }

  bool plain() const { return p.stride == 1 && p.upscale == 1; }
  // x [width] -> staged row
  void pad(const T* x, Real<T>* to) const {
    if (plain()) stage(x, 1, p.width, to + halo);
    for (std::int64_t i = next(-1); i < filled(); i = next(i))
      to[i] = column[i] < 0 ? Real<T>(0) : to_real(x[column[i]]);
  }
  // gradient of a staged row -> that of x [width]; `sum` [width] is work space
  void unpad(const Real<T>* from, Real<T>* sum, T* x) const {
    if (plain())
      std::memcpy(sum, from + halo, std::size_t(p.width) * sizeof(Real<T>));
    else
      std::memset(static_cast<void*>(sum), 0, std::size_t(p.width) * sizeof(Real<T>));
    for (std::int64_t i = next(-1); i < filled(); i = next(i))
      if (column[i] >= 0) sum[column[i]] += from[i];
    unstage(sum, p.width, x);
  }

  const ElementwiseFilter& p;
  // padded: out_width in whole vectors; expanded: a padded and repeated image row; phase, row: lengths of a staged
  // image row's phase and of all of it
  std::int64_t longest = 0, reach, origin_y, origin_x, halo, padded, expanded, phase, row;
  std::int64_t block, line;                   // output rows staged at a time, so that memory is read in long runs
  std::int64_t unit_groups, units, channels;  // groups of a unit, units of an image, channels of a unit
  std::int64_t band_rows, bands, held;
  int threads;
  Buffer<std::int64_t> column;  // [row] the pixel that stands there, -1: zero

 private:
  // The next staged column that the fast path leaves: with no stride and upscale, those of the borders.
  std::int64_t next(std::int64_t i) const { return plain() && i + 1 == halo ? halo + p.width : i + 1; }
  std::int64_t filled() const { return plain() ? expanded : row; }
};

// The rows that one thread works on.
template <class T>
class Rows {
 public:
  using R = Real<T>;

  explicit Rows(const Plan<T>& plan) : plan(plan), p(plan.p) {
    image.resize((plan.channels * plan.held + 1) * plan.row + lanes<T>);
    weights.resize(plan.unit_groups * p.taps() * plan.line);
    value.resize(plan.padded);
    taps.resize(p.taps());
    offsets.resize(p.kernel_width);
  }
  explicit operator bool() const { return image && weights && value && taps && offsets; }

  // The image rows that the taps of a task read.
  void stage_image(const Task& task) {
    low = clamp(task.begin - plan.reach, 0, p.height);
    const std::int64_t high = clamp(task.end + plan.reach, 0, p.height);
    const T* x = static_cast<const T*>(p.x) + (task.image * p.channels + task.unit * plan.channels) * p.height * p.width;
    for (std::int64_t c = 0; c < plan.channels; ++c)
      for (std::int64_t y = low; y < high; ++y)
        plan.pad(x + (c * p.height + y) * p.width, image + (c * plan.held + y - low) * plan.row);
  }

  // weights [unit_groups * taps][block][padded]: of `count` output rows from Y on, after the softmax.
  void stage_weights(const Task& task, std::int64_t Y, std::int64_t count) {
    const std::int64_t n = plan.unit_groups * p.taps(), *strides = p.kernel_strides;
    const T* kernel = static_cast<const T*>(p.kernel) + task.image * strides[0] + task.unit * n * strides[1];
    const bool whole = plan.padded == p.out_width && strides[2] == p.out_width * strides[3];
    for (std::int64_t t = 0; t < n; ++t) {
      const T* from = kernel + t * strides[1] + Y * strides[2];
      R* to = weights + t * plan.line;
      if (whole)
        stage(from, strides[3], count * p.out_width, to);
      else
        for (std::int64_t r = 0; r < count; ++r)
          stage(from + r * strides[2], strides[3], p.out_width, to + r * plan.padded);
    }
    if (p.normalize == Normalize::none) return;
    // The next rows, of this unit or the next one, come from memory while this softmax computes.
    const bool more = plan.first_output(task.end) > Y + count;
    const T* ahead = more ? kernel + (Y + count) * strides[2] : kernel + n * strides[1];
    for (std::int64_t X = 0; X < count * plan.padded; X += lanes<T>) {
      for (std::int64_t t = 0; whole && t < n; ++t) __builtin_prefetch(ahead + t * strides[1] + X, 0, 2);
      softmax(weights + X, n);
    }
  }

  // The staged row of channel c that row i of output row Y's taps reads.
  const R* tap_row(std::int64_t c, std::int64_t Y, std::int64_t i, std::int64_t dilation) const {
    const std::int64_t y = plan.source_row(Y, i, dilation);
    return image + (y < 0 ? plan.channels * plan.held : c * plan.held + y - low) * plan.row;
  }
  // taps[t]: where tap t of output row Y reads channel c.
  void find_taps(std::int64_t c, std::int64_t Y, std::int64_t dilation) {
    for (std::int64_t i = 0, t = 0; i < p.kernel_height; ++i) {
      const R* row = tap_row(c, Y, i, dilation);
      for (std::int64_t j = 0; j < p.kernel_width; ++j, ++t) taps[t] = row + offsets[j];
    }
  }
  void find_offsets(std::int64_t dilation) {
    for (std::int64_t j = 0; j < p.kernel_width; ++j) offsets[j] = plan.tap_offset(j, dilation);
  }

  // Of channel c's group: [taps][block][padded].
  const R* weights_of(std::int64_t c) const {
    return weights + c * plan.unit_groups / plan.channels * p.taps() * plan.line;
  }

  const Plan<T>& plan;
  const ElementwiseFilter& p;
  Buffer<R> image;  // [channels][held][row], then a row of zeros
  Buffer<R> weights, value;
  Buffer<const R*> taps;
  Buffer<std::int64_t> offsets;  // [kernel_width]
  std::int64_t low = 0;          // the first source row in `image`

 private:
  void softmax(R* w, std::int64_t n) {
    Vec<T> most{}, sum{};
    for (std::int64_t t = 0; t < n; ++t) {
      Vec<T> v = load(w + t * plan.line);
      if (p.log_window) store(w + t * plan.line, v += R(p.log_window[t % p.taps()]));
      most = t == 0 ? v : (v > most ? v : most);
    }
    for (std::int64_t t = 0; t < n; ++t) {
      const Vec<T> e = exp_negative(load(w + t * plan.line) - most);
      store(w + t * plan.line, e);
      sum += e;
    }
    sum = R(1) / sum;
    for (std::int64_t t = 0; t < n; ++t) store(w + t * plan.line, load(w + t * plan.line) * sum);
  }
};

// work(rows, task) on every task; every thread has rows of its own, of type Worker.
template <class Worker, class T, class F>
Status for_each_band(const Plan<T>& plan, F&& work) {
  if (!plan.column) return Status::out_of_memory;
  const std::int64_t run = plan.tasks() / (8 * plan.threads) + 1;  // neighbours in memory go to one thread
  return for_each_task(
      plan.threads, (plan.tasks() + run - 1) / run, [&] { return Worker(plan); },
      [&](Worker& rows, std::int64_t i) {
        for (std::int64_t t = i * run; t < clamp((i + 1) * run, 0, plan.tasks()); ++t) work(rows, plan.task(t));
        streamed();
        return Status::ok;
      });
}

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
