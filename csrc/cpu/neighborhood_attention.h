// What the forward and the backward kernels of neighborhood_attention share: windows, staged rows, two micro-kernels.
//
// A task is a band of rows of one residue class (rows a dilation apart), of one head of one image. Rows of tokens are
// staged transposed, [dim][columns], so a vector holds neighbouring columns. A key lies `offset` steps of the dilation
// from its query, and the same offset is the same distance in every lane, whatever the lane's residue class: so a
// vector of queries meets a vector of keys by one unaligned load, and only the lanes outside their windows are masked.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "tasks.h"
#include "transpose.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr int most_rows = 4;                         // that share the keys they load
constexpr int most_wide = vector_bytes == 64 ? 4 : 2;  // offsets, or channels, of a block in registers

// Of what is long and called from several places, or the same for every dtype, one copy.
#define INR_ONCE __attribute__((noinline))

template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

template <class T>
INR_INLINE Vec<T> masked(Vec<T> v, Mask<T> mask) {
  return (Vec<T>)((Mask<T>)v & mask);
}

template <class V>
INR_INLINE void clear(V* values, std::int64_t n) {
  std::memset(static_cast<void*>(values), 0, std::size_t(n) * sizeof(V));
}

// Positions [begin, end) within a residue class.
struct Window {
  std::int64_t begin, end;
};

// NATTEN's rule: the keys that the query at position i of its class of n sees.
inline Window window(const Axis& a, std::int64_t i, std::int64_t n) {
  const std::int64_t group = i / a.stride * a.stride;
  if (a.causal) {
    const std::int64_t lead = clamp(group + a.stride - 1, 0, n - 1);
    return {clamp(lead - a.kernel + 1, 0, n), i + 1};
  }
  const std::int64_t lead = clamp(group + a.stride / 2, 0, n - 1);
  const std::int64_t begin = clamp(lead - a.kernel / 2, 0, n - a.kernel);
  return {begin, begin + a.kernel};
}

// Its inverse: the queries that see the key at position i. Windows hold their query, and neither end ever moves back.
inline Window viewers(const Axis& a, std::int64_t i, std::int64_t n) {
  Window w{i, i + 1};
  while (w.begin > 0 && window(a, w.begin - 1, n).end > i) --w.begin;
  while (w.end < n && window(a, w.end, n).begin <= i) ++w.end;
  return w;
}

INR_INLINE std::int64_t class_size(const Axis& a, std::int64_t residue) {
  return (a.length - residue + a.dilation - 1) / a.dilation;
}

// The offsets at which any lane of a vector has a partner, and which lanes have.
template <class T>
struct Partners {
  std::int64_t first = 0, count = 0;
  const Mask<T>* masks = nullptr;  // [count]
};

// The partners of every vector of columns: the keys of queries, or the queries of keys.
template <class T>
class Columns {
 public:
  Columns(const Axis& a, bool of_keys) : axis_(a), reach_(a.kernel - 1) {
    const std::int64_t vectors = round_up(a.length, lanes<T>) / lanes<T>;
    partners_.resize(vectors);
    masks_.resize(vectors * (2 * reach_ + 1));
    if (!*this) return;
    for (std::int64_t v = 0; v < vectors; ++v) find(v, of_keys);
  }
  explicit operator bool() const { return partners_ && masks_; }
  const Partners<T>& operator[](std::int64_t v) const { return partners_[v]; }

 private:
  void find(std::int64_t v, bool of_keys) {
    Mask<T>* masks = masks_ + v * (2 * reach_ + 1);
    std::int64_t first = reach_ + 1, last = -reach_;
    for (std::int64_t lane = 0; lane < lanes<T> && v * lanes<T> + lane < axis_.length; ++lane) {
      const std::int64_t x = v * lanes<T> + lane, i = x / axis_.dilation, n = class_size(axis_, x % axis_.dilation);
      const Window w = of_keys ? viewers(axis_, i, n) : window(axis_, i, n);
      const std::int64_t low = of_keys ? i - w.end + 1 : w.begin - i, high = low + w.end - w.begin;
      for (std::int64_t offset = low; offset < high; ++offset) masks[offset + reach_][lane] = -1;
      first = low < first ? low : first;
      last = high > last ? high : last;
    }
    partners_[v].first = first;
    partners_[v].count = last - first;
    partners_[v].masks = masks + first + reach_;
  }

  const Axis& axis_;
  std::int64_t reach_;
  Buffer<Partners<T>> partners_;
  Buffer<Mask<T>> masks_;
};

struct Task {
  std::int64_t image, head, residue, begin, end;  // positions in the class of rows
};

// How a problem is cut, and how long its staged rows are.
template <class T>
struct Plan {
  explicit Plan(const NeighborhoodAttention& problem) : p(problem), keys_of(p.x, false) {
    vectors = round_up(p.x.length, lanes<T>) / lanes<T>;
    row = ((vectors + 2) | 1) * lanes<T>;  // a margin at each end; odd, so that channels do not share cache sets
    width = 2 * p.x.kernel - 1;
    const std::int64_t units = p.batch * p.heads * p.y.dilation, longest = class_size(p.y, 0);
    const double work = double(units) * double(longest * p.x.length) * double(p.y.kernel * p.x.kernel * p.dim);
    threads = int(clamp(std::int64_t(work / 1e6) + 1, 1, p.threads));
    const std::int64_t wanted = threads > 1 ? (4 * threads + units - 1) / units : 1;
    band = clamp(round_up((longest + wanted - 1) / wanted, most_rows), most_rows, round_up(longest, most_rows));
    bands = (longest + band - 1) / band;
  }

  std::int64_t tasks() const { return p.batch * p.y.dilation * bands * p.heads; }
  // Heads are neighbours in memory, so they come one after the other.
  Task task(std::int64_t i) const {
    const std::int64_t begin = i / p.heads % bands * band, residue = i / p.heads / bands % p.y.dilation;
    const std::int64_t n = class_size(p.y, residue);
    return {i / p.heads / bands / p.y.dilation, i % p.heads, residue, clamp(begin, 0, n), clamp(begin + band, 0, n)};
  }

  // The most positions that `range` spans over most_rows positions of a row class.
  template <class F>
  std::int64_t most(F range) const {
    std::int64_t result = 0;
    for (const std::int64_t size : {class_size(p.y, 0), class_size(p.y, p.y.dilation - 1)})
      for (std::int64_t i = 0; i < size; ++i) {
        const std::int64_t last = clamp(i + most_rows, 0, size) - 1;
        const std::int64_t held = range(p.y, last, size).end - range(p.y, i, size).begin;
        result = held > result ? held : result;
      }
    return result;
  }

  const NeighborhoodAttention& p;
  Columns<Real<T>> keys_of;
  std::int64_t vectors, row, width;  // of a row; floats of a staged row of one channel; offsets 1 - K ... K - 1
  std::int64_t band, bands;
  int threads;
};

// Calls f with the constant n, 1 ... Most.
template <int Most, class F>
INR_INLINE void with(std::int64_t n, F&& f) {
  if constexpr (Most > 0) {
    if (n == Most)
      f(std::integral_constant<int, Most>{});
    else
      with<Most - 1>(n, f);
  }
}

// to[r][c] = sum_d a[r][d] b[d][c]: R rows of queries, C offsets.
template <int R, int C, class T>
INR_ONCE void multiply(const T* const* a, const T* b, std::int64_t b_step, std::int64_t dim, std::int64_t row,
                       T* const* to, std::int64_t to_step) {
  Vec<T> sum[R][C]{};
  for (std::int64_t d = 0; d < dim * row; d += row) {
    Vec<T> key[C];
    for (int c = 0; c < C; ++c) key[c] = load(b + d + c * b_step);
    for (int r = 0; r < R; ++r) {
      const Vec<T> query = load(a[r] + d);
      for (int c = 0; c < C; ++c) sum[r][c] += query * key[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(to[r] + c * to_step, sum[r][c]);
}

// sums[r][d] += sum_o weights[r][o] b[d][o]: R rows, D channels.
template <int R, int D, class T>
INR_ONCE void combine(const T* const* weights, std::int64_t weight_step, const T* b, std::int64_t b_step,
                      std::int64_t row, const Partners<T>& partners, T* const* sums) {
  Vec<T> sum[R][D];
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) sum[r][d] = load(sums[r] + d * lanes<T>);
  for (std::int64_t o = 0; o < partners.count; ++o) {
    const Mask<T> mask = partners.masks[o];
    Vec<T> value[D];
    for (int d = 0; d < D; ++d) value[d] = masked<T>(load(b + d * row + o * b_step), mask);
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = masked<T>(load(weights[r] + o * weight_step), mask);
      for (int d = 0; d < D; ++d) sum[r][d] += weight * value[d];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) store(sums[r] + d * lanes<T>, sum[r][d]);
}

// Staged rows [dim][row] by their position in the class; a new one takes the place of the oldest.
template <class R>
class Ring {
 public:
  Ring(std::int64_t slots, std::int64_t size) : slots_(slots), size_(size), data_(slots * size) {}
  explicit operator bool() const { return bool(data_); }
  R* operator[](std::int64_t i) const { return data_ + i % slots_ * size_; }

 private:
  std::int64_t slots_, size_;
  Buffer<R> data_;
};

// Where the scores of a query row lie: [key row][offset][lanes], or the lanes of a whole row.
struct Layout {
  std::int64_t key, offset;
};

// What one thread works with.
template <class T>
class Rows {
 public:
  using R = Real<T>;

  explicit Rows(const Plan<T>& plan)
      : plan(plan), p(plan.p), n(0), keys(plan.most(window), p.dim * plan.row), values(plan.most(window), p.dim * plan.row),
        sums(most_rows * p.dim * lanes<T>) {}
  explicit operator bool() const { return keys && values && sums; }

  void begin(const Task& t) {
    task = t;
    n = class_size(p.y, t.residue);
    staged = window(p.y, t.begin, n).begin;
  }

  std::int64_t y(std::int64_t i) const { return task.residue + i * p.y.dilation; }

  // Row i of some tokens, `scale` times, transposed; columns past the last are zero.
  INR_ONCE void stage(const Tokens& tokens, std::int64_t i, R scale, R* to) const {
    const std::int64_t* s = tokens.strides;
    const T* from = static_cast<const T*>(tokens.data) + task.image * s[0] + y(i) * s[1] + task.head * s[3];
    to += lanes<T>;
    for (std::int64_t x = 0; x < p.x.length; x += lanes<T>)
      for (std::int64_t d = 0; d < p.dim; d += lanes<T>) {
        Vec<T> tile[lanes<T>]{};
        for (std::int64_t k = 0; k < clamp(p.x.length - x, 0, lanes<T>); ++k)
          tile[k] = load_some<T>(from + (x + k) * s[2] + d, p.dim - d) * scale;
        transpose<T>(tile);
        for (std::int64_t k = 0; k < clamp(p.dim - d, 0, lanes<T>); ++k) store(to + (d + k) * plan.row + x, tile[k]);
      }
  }

  // sums [dim][lanes], each lane `scale` times, -> a vector of columns of row i.
  INR_ONCE void unstage(const R* from, Vec<T> scale, const Tokens& tokens, std::int64_t i, std::int64_t v) const {
    const std::int64_t *s = tokens.strides, x = v * lanes<T>;
    T* to = static_cast<T*>(const_cast<void*>(tokens.data)) + task.image * s[0] + y(i) * s[1] + task.head * s[3];
    for (std::int64_t d = 0; d < p.dim; d += lanes<T>) {
      Vec<T> tile[lanes<T>]{};
      for (std::int64_t k = 0; k < clamp(p.dim - d, 0, lanes<T>); ++k) tile[k] = load(from + (d + k) * lanes<T>) * scale;
      transpose<T>(tile);
      for (std::int64_t k = 0; k < clamp(p.x.length - x, 0, lanes<T>); ++k)
        store_some<T>(tile[k], p.dim - d, to + (x + k) * s[2] + d);
    }
  }

  void stage_keys(std::int64_t end) {
    for (; staged < end; ++staged) {
      stage(p.key, staged, R(1), keys[staged]);
      stage(p.value, staged, R(1), values[staged]);
    }
  }

  // scores[r] = queries[r] . keys, of `count` rows that see the windows; queries, keys: any two staged kinds.
  INR_ONCE void multiply_windows(int count, const Window* windows, const R* const* queries, const Ring<R>& ring,
                        const Partners<R>& partners, std::int64_t v, R* const* scores, Layout layout) const {
    for_each_row(count, windows, [&](std::int64_t t, int first, int rows) {
      const R* a[most_rows];
      R* to[most_rows];
      for (int r = 0; r < rows; ++r) {
        a[r] = queries[first + r] + (v + 1) * lanes<T>;
        to[r] = scores[first + r] + (t - windows[first + r].begin) * layout.key;
      }
      const R* b = ring[t] + (v + 1) * lanes<T> + partners.first * p.x.dilation;
      std::int64_t blocks = (partners.count + most_wide - 1) / most_wide;
      for (std::int64_t o = 0, wide; o < partners.count; o += wide, --blocks) {
        wide = (partners.count - o + blocks - 1) / blocks;
        with<most_rows>(rows, [&](auto R_) {
          with<most_wide>(wide, [&](auto C) {
            multiply<R_, C>(a, b + o * p.x.dilation, p.x.dilation, p.dim, plan.row, to, layout.offset);
          });
        });
        for (int r = 0; r < rows; ++r) to[r] += wide * layout.offset;
      }
    });
  }

  // sums[r] += scores[r] . values, of the same windows.
  INR_ONCE void combine_windows(int count, const Window* windows, R* const* scores, Layout layout, const Ring<R>& ring,
                       const Partners<R>& partners, std::int64_t v) {
    for_each_row(count, windows, [&](std::int64_t t, int first, int rows) {
      const R* weights[most_rows];
      for (int r = 0; r < rows; ++r) weights[r] = scores[first + r] + (t - windows[first + r].begin) * layout.key;
      const R* b = ring[t] + (v + 1) * lanes<T> + partners.first * p.x.dilation;
      combine_rows(first, rows, weights, layout.offset, b, p.x.dilation, partners);
    });
  }

  INR_ONCE void combine_rows(int first, int rows, const R* const* weights, std::int64_t weight_step, const R* b,
                    std::int64_t b_step, const Partners<R>& partners) {
    for (std::int64_t d = 0; d < p.dim; d += most_wide) {
      R* to[most_rows];
      for (int r = 0; r < rows; ++r) to[r] = sum(first + r) + d * lanes<T>;
      with<most_rows>(rows, [&](auto R_) {
        with<most_wide>(clamp(p.dim - d, 0, most_wide), [&](auto D) {
          combine<R_, D>(weights, weight_step, b + d * plan.row, b_step, plan.row, partners, to);
        });
      });
    }
  }

  // [dim][lanes]
  R* sum(int r) const { return sums + r * p.dim * lanes<T>; }
  void clear_sums() { clear(static_cast<R*>(sums), most_rows * p.dim * lanes<T>); }

  // The bias of the scores of query row i with key row t, at a vector's first offset; nullptr: none.
  const R* bias(std::int64_t i, std::int64_t t, const Partners<R>& partners) const {
    if (!p.bias) return nullptr;
    return static_cast<const R*>(p.bias) +
           (task.head * (2 * p.y.kernel - 1) + t - i + p.y.kernel - 1) * plan.width + partners.first + p.x.kernel - 1;
  }

  const Plan<T>& plan;
  const NeighborhoodAttention& p;
  Task task;
  std::int64_t n;  // positions in the task's class of rows
  std::int64_t staged = 0;
  Ring<R> keys, values;
  Buffer<R> sums;  // [most_rows][dim][lanes]

 private:
  // work(key row, the first row that sees it, how many do)
  template <class F>
  void for_each_row(int count, const Window* windows, F&& work) const {
    for (std::int64_t t = windows[0].begin; t < windows[count - 1].end; ++t) {
      int first = 0, last;
      while (windows[first].end <= t) ++first;
      for (last = first; last < count && windows[last].begin <= t;) ++last;
      if (last > first) work(t, first, last - first);
    }
  }
};

// work(worker), which has begun a task, on every one; every thread has a worker of its own.
template <class Worker, class T, class F>
Status for_each_run(const Plan<T>& plan, F&& work) {
  return for_each_task(
      plan.threads, plan.tasks(), [&] { return Worker(plan); },
      [&](Worker& worker, std::int64_t i) {
        const Task task = plan.task(i);
        if (task.begin == task.end) return Status::ok;
        worker.begin(task);
        work(worker);
        return Status::ok;
      });
}

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
