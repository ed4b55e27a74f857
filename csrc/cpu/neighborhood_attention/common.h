// Shared by the forward and the backward of neighborhood_attention: staged rows and two micro-kernels.
//
// A task is a band of rows of one residue class (rows that are a dilation apart) of one head of one image; of long
// rows, a segment. Rows of tokens are staged transposed, [dim][columns], so that a vector holds neighbouring columns.
// The offset of a key from its query, in steps of the dilation, is the same distance in every lane. The keys of a
// vector of queries are therefore one unaligned load per offset, and only the lanes outside their windows are masked.
// In three dimensions, the queries of a task have one depth, so that all see the same planes of keys: each is one more
// row of keys per row.
#pragma once

#include "../common/tasks.h"
#include "../common/transpose.h"
#include "../entries.h"
#include "blocks.h"
#include "window.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr int max_rows = 4;  // rows of queries that share the loaded keys

// The number of offsets, or of channels, that are summed at once for each of `rows` rows: at most 8, which hide the
// latency of a multiply-add, and all sums in half of the registers.
constexpr int wide(int rows) { return registers / 2 / rows < 8 ? registers / 2 / rows : 8; }

template <class T>
INR_INLINE Vec<T> masked(Vec<T> v, Mask<T> mask) {
  return (Vec<T>)((Mask<T>)v & mask);
}

// values: [n]
template <class V>
INR_INLINE void clear(V* values, std::int64_t n) {
  std::memset(static_cast<void*>(values), 0, std::size_t(n) * sizeof(V));
}

// Vectors of columns of a task: those whose results it writes, and those of the queries and keys that it stages.
struct Segment {
  Window own, queries, keys;
};

struct NeighborhoodTask {
  std::int64_t image, depth, head, residue, begin, end;  // head: the first; begin, end: positions in the class of rows
  std::int64_t part;                                     // the number of the segment in its row
  Segment columns;
};

// One head of some tokens.
struct Head {
  const Tokens& tokens;
  std::int64_t head, dim;
};

// How the problem is divided into tasks, and the sizes of staged rows.
template <class T>
struct NeighborhoodPlan {
  // column_size: numbers that a task keeps of a column. query_neighbours: of the keys, whose gradients tasks compute;
  // nullptr if they do not.
  NeighborhoodPlan(const NeighborhoodAttention& problem, std::int64_t heads_of_task, std::int64_t column_size,
                   const ColumnNeighbours<Real<T>>* query_neighbours)
      : p(problem), heads(heads_of_task), key_neighbours(p.x, false), offsets(2 * p.x.kernel - 1) {
    if (!key_neighbours || !divide_rows(column_size, query_neighbours)) return;
    const std::int64_t units = p.batch * p.z.length * p.heads / heads * p.y.dilation,
                       longest = class_size(p.y, 0);
    const double work = double(units * heads) * double(longest * p.x.length) *
                        (double(p.z.kernel * p.y.kernel * p.x.kernel) * double(p.dim + p.value_dim) / 2);
    threads = int(clamp(std::int64_t(work / 1e6) + 1, 1, p.threads));
    const std::int64_t min_bands = threads > 1 ? (4 * threads + units * parts - 1) / (units * parts) : 1;
    band_rows = clamp(round_up((longest + min_bands - 1) / min_bands, max_rows), max_rows, round_up(longest, max_rows));
    bands = (longest + band_rows - 1) / band_rows;
  }

  explicit operator bool() const { return bands; }

  std::int64_t tasks() const { return p.batch * p.z.length * p.y.dilation * bands * parts * (p.heads / heads); }
  // Heads are adjacent in memory, so consecutive tasks are different heads of the same rows.
  NeighborhoodTask task(std::int64_t i) const {
    const std::int64_t groups = p.heads / heads, part = i / groups % parts, band = i / groups / parts;
    const std::int64_t residue = band / bands % p.y.dilation, n = class_size(p.y, residue);
    const std::int64_t begin = band % bands * band_rows, plane = band / bands / p.y.dilation;
    return {plane / p.z.length, plane % p.z.length, i % groups * heads, residue, clamp(begin, 0, n),
            clamp(begin + band_rows, 0, n), part, segments[part]};
  }

  // The largest number of positions that range(axis, i, n) covers for max_rows consecutive positions i.
  template <class F>
  std::int64_t max_span(F range) const {
    std::int64_t result = 0;
    for (const std::int64_t size : {class_size(p.y, 0), class_size(p.y, p.y.dilation - 1)})
      for (std::int64_t i = 0; i < size; ++i) {
        const std::int64_t last = clamp(i + max_rows, 0, size) - 1;
        const std::int64_t span = range(p.y, last, size).end - range(p.y, i, size).begin;
        result = span > result ? span : result;
      }
    return result;
  }

  const NeighborhoodAttention& p;
  std::int64_t heads;  // of a task, adjacent
  ColumnNeighbours<Real<T>> key_neighbours;
  std::int64_t offsets;                   // 1 - kernel ... kernel - 1
  std::int64_t parts, vectors;            // segments of a row; vectors of columns of the longest
  std::int64_t row_length;                // of a staged row of one channel: a vector as margin, the columns, a margin
  std::int64_t band_rows = 0, bands = 0;  // positions of a task, tasks of a residue class
  int threads = 1;
  Buffer<Segment> segments;  // [parts]

 private:
  // Divides rows into segments that fit the L2 cache, and into at least min_tasks tasks; but not into segments shorter
  // than min_vectors, than the columns that neighbouring tasks both stage, or than four times those for which both also
  // compute. The division does not depend on the number of threads: the bias gradient is summed by segment and must
  // have the same bits for any number of threads.
  bool divide_rows(std::int64_t column_size, const ColumnNeighbours<Real<T>>* query_neighbours) {
    constexpr std::int64_t cache_bytes = 384 << 10, min_tasks = 64, min_vectors = 16;
    const auto vectors_of = [](std::int64_t columns) { return round_up(columns, lanes<T>) / lanes<T>; };
    const std::int64_t both = (p.x.kernel - 1) * p.x.dilation, all = vectors_of(p.x.length);
    const std::int64_t least = clamp(vectors_of((query_neighbours ? 4 : 1) * both), min_vectors, all);
    const std::int64_t rows = p.batch * p.z.length * p.y.length * p.heads / heads;
    const std::int64_t fitting = cache_bytes / (column_size * std::int64_t(sizeof(Real<T>))) - both;
    const std::int64_t wanted = vectors_of(clamp(p.x.length * rows / min_tasks, 1, clamp(fitting, 1, p.x.length)));
    const std::int64_t most = all < 2 * least ? 1 : all / least;
    parts = clamp((all + wanted - 1) / wanted, 1, most);
    vectors = (all + parts - 1) / parts;
    parts = (all + vectors - 1) / vectors;
    if (!segments.resize(parts)) return false;
    row_length = 0;
    for (std::int64_t i = 0; i < parts; ++i) {
      const Window own{i * vectors, clamp((i + 1) * vectors, 0, all)};
      const Window queries = query_neighbours ? query_neighbours->reached(own, true) : own;
      const Window keys = key_neighbours.reached(queries, false);
      segments[i] = {own, queries, keys};
      row_length = keys.end - keys.begin > row_length ? keys.end - keys.begin : row_length;
    }
    row_length = ((row_length + 2) | 1) * lanes<T>;  // odd, so that channels fall into different cache sets
    return true;
  }
};

// Scores of R rows of queries at C offsets, for a vector of columns: to[r][c] = sum_d a[r][d] b[d][c].
// a: [R] pointers to [dim][row]; b: [dim][row], C vectors b_step apart; to: [R] pointers to C vectors to_step apart
template <int R, int C, class T>
INR_NOINLINE void multiply(const T* const* a, const T* b, std::int64_t b_step, std::int64_t dim, std::int64_t row,
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

// Weighted sums of R rows and D channels, for a vector of columns: sums[r][d] += sum_o weights[r][o] b[d][o].
// weights: [R] pointers to [neighbours.count] vectors weight_step apart; b: [D][row], vectors b_step apart;
// sums: [R] pointers to [D][lanes]. Masked: whether there are lanes without a neighbour.
template <bool Masked, int R, int D, class T>
INR_NOINLINE void combine(const T* const* weights, std::int64_t weight_step, const T* b, std::int64_t b_step,
                      std::int64_t row, const Neighbours<T>& neighbours, T* const* sums) {
  Vec<T> sum[R][D];
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) sum[r][d] = load(sums[r] + d * lanes<T>);
  for (std::int64_t o = 0; o < neighbours.count; ++o) {
    const auto loaded = [&](const T* from) {
      if constexpr (Masked) return masked<T>(load(from), neighbours.masks[o]);
      return load(from);
    };
    Vec<T> value[D];
    for (int d = 0; d < D; ++d) value[d] = loaded(b + d * row + o * b_step);
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = loaded(weights[r] + o * weight_step);
      for (int d = 0; d < D; ++d) sum[r][d] += weight * value[d];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) store(sums[r] + d * lanes<T>, sum[r][d]);
}

// A ring buffer of rows of `size` elements, indexed by their position in the residue class.
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

// The strides of the scores of a query row: [key row][plane][offset][lanes], or with a whole row of columns for the
// lanes. key: of the first two, of which each is one step.
struct ScoreLayout {
  std::int64_t key, offset;
};

// The staged rows of one thread.
template <class T>
class NeighborhoodRows {
 public:
  using R = Real<T>;

  // max_planes: of the keys, the most that are staged.
  NeighborhoodRows(const NeighborhoodPlan<T>& plan, std::int64_t max_planes)
      : plan(plan), p(plan.p), n(0), keys(plan.max_span(window), max_planes * p.dim * plan.row_length),
        values(plan.max_span(window), max_planes * p.value_dim * plan.row_length),
        sum_size((p.dim > p.value_dim ? p.dim : p.value_dim) * lanes<T>), sums(max_rows * sum_size) {}
  explicit operator bool() const { return keys && values && sums; }

  void begin(const NeighborhoodTask& t) {
    task = t;
    n = class_size(p.y, t.residue);
    staged = window(p.y, t.begin, n).begin;
    depth = t.depth;
    planes = window(p.z, depth / p.z.dilation, class_size(p.z, depth % p.z.dilation));
  }

  std::int64_t plane_count() const { return planes.end - planes.begin; }

  std::int64_t y(std::int64_t i) const { return task.residue + i * p.y.dilation; }

  // The number of the first query of row i and vector v among those of all images.
  std::int64_t pixel(std::int64_t i, std::int64_t v) const {
    return ((task.image * p.z.length + depth) * p.y.length + y(i)) * p.x.length + v * lanes<T>;
  }

  // The task's head of tokens like query, out, key and value.
  Head of_query(const Tokens& tokens) const { return {tokens, task.head, p.dim}; }
  Head of_out(const Tokens& tokens) const { return {tokens, task.head, p.value_dim}; }
  Head of_key(const Tokens& tokens) const { return {tokens, task.head * p.key_heads / p.heads, p.dim}; }
  Head of_value(const Tokens& tokens) const { return {tokens, task.head * p.value_heads / p.heads, p.value_dim}; }

  // The place of vector v of columns in a staged row.
  std::int64_t column(std::int64_t v) const { return (v + 1 - task.columns.keys.begin) * lanes<T>; }

  // Stages vectors v of row i of plane z of some tokens: scales and transposes them; columns past the last are zero.
  // to: [dim][row_length]
  INR_NOINLINE void stage(const Head& h, std::int64_t z, std::int64_t i, Window v, R scale, R* to) const {
    const std::int64_t* s = h.tokens.strides;
    const T* from =
        static_cast<const T*>(h.tokens.data) + task.image * s[0] + z * s[1] + y(i) * s[2] + h.head * s[4];
    to += column(v.begin);
    for (std::int64_t x = v.begin * lanes<T>; x < v.end * lanes<T>; x += lanes<T>, to += lanes<T>)
      for (std::int64_t d = 0; d < h.dim; d += lanes<T>)
        transpose_tile<T>(from + x * s[3] + d, s[3], p.x.length - x, h.dim - d, Vec<T>{} + scale,
                          to + d * plan.row_length, plan.row_length, lanes<T>);
  }

  // Writes sums, each lane times `scale`, to vector v of the columns of row i of plane z. from: [dim][lanes]
  INR_NOINLINE void unstage(const R* from, Vec<T> scale, const Head& h, std::int64_t z, std::int64_t i,
                            std::int64_t v) const {
    const std::int64_t *s = h.tokens.strides, x = v * lanes<T>;
    T* to = static_cast<T*>(const_cast<void*>(h.tokens.data)) + task.image * s[0] + z * s[1] + y(i) * s[2] +
            h.head * s[4];
    for (std::int64_t d = 0; d < h.dim; d += lanes<T>)
      transpose_tile<T>(from + d * lanes<T>, lanes<T>, h.dim - d, p.x.length - x, scale, to + x * s[3] + d, s[3],
                        h.dim - d);
  }

  // Stages the rows of keys and values up to position `end`.
  void stage_keys(std::int64_t end) {
    const std::int64_t first = depth % p.z.dilation + planes.begin * p.z.dilation;
    for (; staged < end; ++staged)
      for (std::int64_t s = 0; s < plane_count(); ++s) {
        const std::int64_t z = first + s * p.z.dilation;
        stage(of_key(p.key), z, staged, task.columns.keys, R(1), keys[staged] + s * p.dim * plan.row_length);
        stage(of_value(p.value), z, staged, task.columns.keys, R(1),
              values[staged] + s * p.value_dim * plan.row_length);
      }
  }

  // scores[r] = queries[r] . keys of its window, for `count` rows and the columns of vector v.
  // windows: [count]; queries: [count] pointers to [dim][row_length]; ring: the keys; scores: [count] pointers to
  // `layout`. Queries and keys may be any two kinds of staged tokens, of `dim` channels.
  INR_NOINLINE void multiply_windows(int count, const Window* windows, const R* const* queries, const Ring<R>& ring,
                                     std::int64_t dim, const Neighbours<R>& neighbours, std::int64_t v,
                                     R* const* scores, ScoreLayout layout) const {
    for_each_row(count, windows, [&](std::int64_t t, std::int64_t plane, int first, int rows) {
      const R* a[max_rows];
      R* to[max_rows];
      for (int r = 0; r < rows; ++r) {
        a[r] = queries[first + r] + column(v);
        to[r] = scores[first + r] + ((t - windows[first + r].begin) * plane_count() + plane) * layout.key;
      }
      const R* b = ring[t] + plane * dim * plan.row_length + column(v) + neighbours.first * p.x.dilation;
      with_constant<max_rows>(rows, [&](auto RowCount) {
        in_blocks<wide(RowCount)>(neighbours.count, [&](std::int64_t o, auto C) {
          multiply<RowCount, C>(a, b + o * p.x.dilation, p.x.dilation, dim, plan.row_length, to, layout.offset);
          for (int r = 0; r < RowCount; ++r) to[r] += C * layout.offset;
        });
      });
    });
  }

  // sums[r] += scores[r] . values of its window. Arguments as in multiply_windows; ring: the values.
  INR_NOINLINE void combine_windows(int count, const Window* windows, R* const* scores, ScoreLayout layout,
                                    const Ring<R>& ring, std::int64_t dim, const Neighbours<R>& neighbours,
                                    std::int64_t v) {
    for_each_row(count, windows, [&](std::int64_t t, std::int64_t plane, int first, int rows) {
      const R* weights[max_rows];
      for (int r = 0; r < rows; ++r)
        weights[r] = scores[first + r] + ((t - windows[first + r].begin) * plane_count() + plane) * layout.key;
      const R* b = ring[t] + plane * dim * plan.row_length + column(v) + neighbours.first * p.x.dilation;
      combine_rows(first, rows, weights, layout.offset, b, p.x.dilation, dim, neighbours);
    });
  }

  // Adds the weighted sums of rows [first, first + rows), all channels in blocks. Arguments as in `combine`.
  INR_NOINLINE void combine_rows(int first, int rows, const R* const* weights, std::int64_t weight_step, const R* b,
                                 std::int64_t b_step, std::int64_t dim, const Neighbours<R>& neighbours) {
    with_constant<max_rows>(rows, [&](auto RowCount) {
      in_blocks<wide(RowCount)>(dim, [&](std::int64_t d, auto D) {
        R* to[max_rows];
        for (int r = 0; r < RowCount; ++r) to[r] = sum(first + r) + d * lanes<T>;
        const auto work = neighbours.uniform ? combine<false, RowCount, D, R> : combine<true, RowCount, D, R>;
        work(weights, weight_step, b + d * plan.row_length, b_step, plan.row_length, neighbours, to);
      });
    });
  }

  // [dim][lanes]
  R* sum(int r) const { return sums + r * sum_size; }
  void clear_sums() { clear(static_cast<R*>(sums), max_rows * sum_size); }

  // The bias of the scores of query row i and row k of its window, whose key rows have plane_count() planes each, from
  // the first offset on: [neighbours.count], or nullptr.
  const R* bias(std::int64_t i, Window rows, std::int64_t k, const Neighbours<R>& neighbours) const {
    if (!p.bias) return nullptr;
    const std::int64_t t = rows.begin + k / plane_count(), z = planes.begin + k % plane_count();
    const std::int64_t plane = task.head * (2 * p.z.kernel - 1) + z - depth / p.z.dilation + p.z.kernel - 1;
    const std::int64_t row = plane * (2 * p.y.kernel - 1) + t - i + p.y.kernel - 1;
    return static_cast<const R*>(p.bias) + row * plan.offsets + neighbours.first + p.x.kernel - 1;
  }

  const NeighborhoodPlan<T>& plan;
  const NeighborhoodAttention& p;
  NeighborhoodTask task;
  std::int64_t n;           // positions of the task's residue class of rows
  std::int64_t depth = 0;   // the coordinate of the plane of the queries
  Window planes{0, 1};      // the planes of the keys: positions in the residue class of that plane
  std::int64_t staged = 0;  // the first position that is not staged yet
  Ring<R> keys, values;     // rows of [planes][dim][row_length]
  std::int64_t sum_size;
  Buffer<R> sums;  // [max_rows][larger dim][lanes]

 private:
  // Calls work(t, plane, first, rows) for every row t and plane of keys, and the query rows [first, first + rows) whose
  // windows contain it.
  template <class F>
  void for_each_row(int count, const Window* windows, F&& work) const {
    for (std::int64_t t = windows[0].begin; t < windows[count - 1].end; ++t) {
      int first = 0, last;
      while (windows[first].end <= t) ++first;
      for (last = first; last < count && windows[last].begin <= t;) ++last;
      for (std::int64_t plane = 0; last > first && plane < plane_count(); ++plane) work(t, plane, first, last - first);
    }
  }
};

// Calls work(worker) for every task, after worker.begin(task); each thread makes its own worker.
template <class T, class Make, class F>
Status for_each_band(const NeighborhoodPlan<T>& plan, Make&& make, F&& work) {
  return for_each_task(
      plan.threads, plan.tasks(), make,
      [&](auto& worker, std::int64_t i) {
        const NeighborhoodTask task = plan.task(i);
        if (task.begin == task.end) return Status::ok;
        worker.begin(task);
        work(worker);
        return Status::ok;
      });
}

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
