// Shared by the kernels of neighborhood_attention for queries of another resolution than the keys, and for the mean
// over the heads.
//
// A task's queries are divided into tiles, rectangles of the queries of one residue class of the keys. The queries of a
// position of the keys see the same window, and those of adjacent positions nearly the same, so that a tile is a small
// dense attention: its keys and values are staged as rows, its queries also transposed, so that a vector holds queries,
// and the products of scores, outputs and gradients are matrix products. Only in a tile of several windows are lanes
// masked; its queries are in groups of one window, and the sums over keys are those of a group's window. Within a
// class, the query with index c belongs to position c / ratio.
#pragma once

#include "../common/tasks.h"
#include "../common/transpose.h"
#include "../entries.h"
#include "products.h"
#include "window.h"

namespace inr {
namespace INR_ISA {

Status tiled_forward(Type type, const NeighborhoodAttention& p, const Tokens& out, void* lse);
Status tiled_backward(Type type, const NeighborhoodAttention& p, const void* lse, const Tokens& grad_out,
                      const void* grad_lse, const NeighborhoodAttentionGradients& to);

// Whether the kernels for tiles run: the others need queries at the keys' positions, and every head's output. Where
// every query sees every key, a tile has one window, of any queries, and no lane is masked: that is faster, too.
INR_INLINE bool needs_tiles(const NeighborhoodAttention& p) {
  const bool all_y = p.y.kernel == p.y.length && !p.y.causal, all_x = p.x.kernel == p.x.length && !p.x.causal;
  const bool all = p.z.length == 1 && all_y && all_x && !p.bias;
  return all || p.mean_heads || p.y.queries != p.y.length || p.x.queries != p.x.length;
}

namespace {

// The queries of a tile along one axis, and the positions of the keys that any of them sees.
struct Side {
  std::int64_t residue, first, count;
  Window keys;
  bool uniform;          // whether all see the same
  std::int64_t pattern;  // tiles of one pattern have as many queries, whose windows lie alike in `keys`
};

// One axis, divided into tiles.
class TiledAxis {
 public:
  // any_position: whether the position of a query does not matter if its window has all keys
  TiledAxis(const Axis& axis, bool any_position) : a(axis), ratio((a.queries + a.length - 1) / a.length) {
    if (any_position && a.kernel == a.length && !a.causal) ratio = a.queries;
  }

  std::int64_t position(std::int64_t query) const { return query / ratio; }
  std::int64_t size_of_class(std::int64_t residue) const { return class_size(a, residue); }
  // The coordinate of a query, and of a key.
  std::int64_t query_at(std::int64_t residue, std::int64_t query) const {
    return (residue + query / ratio * a.dilation) * ratio + query % ratio;
  }
  std::int64_t key_at(std::int64_t residue, std::int64_t key) const { return residue + key * a.dilation; }
  Window window_of(std::int64_t residue, std::int64_t query) const {
    return window(a, position(query), size_of_class(residue));
  }

  // Divides the axis into tiles of `cells` positions or, if that is 1, of 1 / `parts` of a position's queries.
  bool divide(std::int64_t cells, std::int64_t parts) {
    const std::int64_t step = cells > 1 ? cells * ratio : (ratio + parts - 1) / parts;
    for (int pass = 0; pass < 2; ++pass) {
      count = 0;
      for (std::int64_t residue = 0; residue < a.dilation; ++residue) {
        const std::int64_t all = size_of_class(residue) * ratio, n = a.dilation > 1 ? all : clamp(a.queries, 0, all);
        for (std::int64_t c = 0, end; c < n; c = end) {
          end = clamp(c + step, 0, cells > 1 ? n : clamp((c / ratio + 1) * ratio, 0, n));
          if (pass) {
            tiles[count] = tile(residue, c, end - c);
            tiles[count].pattern = count && alike(tiles[count - 1], tiles[count]) ? tiles[count - 1].pattern : count;
          }
          ++count;
        }
      }
      if (!pass && !tiles.resize(count)) return false;
    }
    return true;
  }

  // The largest number of queries, and of keys, of a tile.
  std::int64_t max_queries() const { return largest([](const Side& s) { return s.count; }); }
  std::int64_t max_keys() const { return largest([](const Side& s) { return s.keys.end - s.keys.begin; }); }

  const Axis& a;
  std::int64_t ratio, count = 0;
  Buffer<Side> tiles;  // [count]

 private:
  Side tile(std::int64_t residue, std::int64_t first, std::int64_t queries) const {
    const Window low = window_of(residue, first), high = window_of(residue, first + queries - 1);
    return {residue, first, queries, {low.begin, high.end}, low.begin == high.begin && low.end == high.end, 0};
  }
  bool alike(const Side& s, const Side& t) const {
    bool result = s.count == t.count && s.keys.end - s.keys.begin == t.keys.end - t.keys.begin;
    for (std::int64_t i = 0; result && i < s.count; i += ratio) {
      const Window v = window_of(s.residue, s.first + i), w = window_of(t.residue, t.first + i);
      result = v.begin - s.keys.begin == w.begin - t.keys.begin && v.end - s.keys.begin == w.end - t.keys.begin;
    }
    return result;
  }
  template <class F>
  std::int64_t largest(F size) const {
    std::int64_t result = 0;
    for (std::int64_t i = 0; i < count; ++i) result = size(tiles[i]) > result ? size(tiles[i]) : result;
    return result;
  }
};

// The division of a problem into tiles.
template <class T>
struct TilePlan {
  explicit TilePlan(const NeighborhoodAttention& problem) : p(problem), y(p.y, !p.bias), x(p.x, !p.bias) {
    std::int64_t best[4] = {1, 1, 1, 1};
    double least = 1e300;
    for (int i = 0; i < choices; ++i)
      for (int j = 0; j < choices; ++j) {
        std::int64_t c[4];
        if (!choose(y, i, c) || !choose(x, j, c + 2)) continue;
        const double cost = cost_of(c);
        if (cost < least) std::memcpy(best, c, sizeof best), least = cost;
      }
    if (!y.divide(best[0], best[1]) || !x.divide(best[2], best[3])) return;
    columns = round_up(y.max_queries() * x.max_queries(), unit);
    keys = round_up(y.max_keys() * x.max_keys(), product_rows);
    dim = round_up(p.dim, lanes<T>);
    value_dim = round_up(p.value_dim, lanes<T>);
    const double queries = double(p.batch * p.heads) * double(p.y.queries * p.x.queries);
    threads = useful_threads(2 * queries * double(p.y.kernel * p.x.kernel) * double(p.dim + p.value_dim), p.threads);
  }
  explicit operator bool() const { return columns; }

  const NeighborhoodAttention& p;
  TiledAxis y, x;
  std::int64_t columns = 0, keys = 0;  // the most queries and keys of a tile, rounded up
  std::int64_t dim = 0, value_dim = 0;  // of staged rows, rounded up
  int threads = 1;

 private:
  static constexpr std::int64_t max_columns = 128;
  static constexpr std::int64_t unit = lanes<T> > product_rows ? lanes<T> : product_rows;

  // The choices for a side of a tile: 1 to 4 positions, 1 / 2 to 1 / 16 of one, or 16 to 128 queries of one.
  static constexpr int choices = 4 + 15 + 4;
  static bool choose(const TiledAxis& axis, int i, std::int64_t* c) {
    c[0] = i < 4 ? i + 1 : 1;
    c[1] = i < 4 ? 1 : i < 19 ? i - 2 : (axis.ratio + (16 << (i - 19)) - 1) / (16 << (i - 19));
    return c[1] <= axis.ratio;
  }

  // The work for one query if a tile has cells[0] x cells[2] positions, or a part of one. Staging a key costs as much
  // as some queries.
  double cost_of(const std::int64_t (&c)[4]) const {
    const std::int64_t side_y = c[0] > 1 ? c[0] * y.ratio : (y.ratio + c[1] - 1) / c[1];
    const std::int64_t side_x = c[2] > 1 ? c[2] * x.ratio : (x.ratio + c[3] - 1) / c[3];
    const std::int64_t columns = round_up(side_y * side_x, unit);
    const std::int64_t rows = clamp(p.y.kernel + c[0] - 1, 0, p.y.length);
    const std::int64_t across = clamp(p.x.kernel + c[2] - 1, 0, p.x.length);
    const double queries = double(c[0] * y.ratio) / double(c[1]) * (double(c[2] * x.ratio) / double(c[3]));
    const bool large = columns > max_columns || (columns > unit && rows * across * columns > 1 << 16);
    return double(rows * across) * double(columns + 3) / queries * (large ? 1e3 * double(columns) : 1);
  }
};

// What a thread stages of a tile.
template <class T>
class TileRows {
 public:
  using R = Real<T>;

  explicit TileRows(const TilePlan<T>& plan)
      : plan(plan), p(plan.p), query_columns(plan.dim * plan.columns), weights(plan.keys * plan.columns),
        index_y(plan.columns), index_x(plan.columns), steps_y(plan.columns), steps_x(plan.columns),
        windows_y(plan.y.max_queries()), windows_x(plan.x.max_queries()),
        row_masks(plan.y.max_keys() * plan.columns / lanes<T>),
        column_masks(plan.x.max_keys() * plan.columns / lanes<T>) {}
  explicit operator bool() const {
    return query_columns && weights && index_y && index_x && steps_y && steps_x && windows_y && windows_x &&
           row_masks && column_masks;
  }

  // Chooses a tile of an image.
  void begin(std::int64_t image_, const Side& y_, const Side& x_) {
    const bool arranged = y.count && y.pattern == y_.pattern && x.pattern == x_.pattern;
    image = image_, y = y_, x = x_;
    first_y = plan.y.query_at(y.residue, y.first), first_x = plan.x.query_at(x.residue, x.first);
    if (!arranged) arrange();
  }

  // The coordinates of query m, and its number among the pixels of all images.
  std::int64_t row(std::int64_t m) const { return first_y + steps_y[m]; }
  std::int64_t column(std::int64_t m) const { return first_x + steps_x[m]; }
  std::int64_t pixel(std::int64_t m) const { return (image * p.y.queries + row(m)) * p.x.queries + column(m); }

  // The channels of query m in a head of some tokens.
  T* query_of(const Tokens& t, std::int64_t head, std::int64_t m) const { return at(t, head, row(m), column(m)); }

  // Stages the queries of a tile transposed, and as rows unless that is nullptr. transposed: [dim][columns];
  // rows: [columns][round_up(dim)]
  INR_NOINLINE void stage_queries(const Tokens& t, std::int64_t head, std::int64_t dim, R scale, R* transposed,
                                  R* rows = nullptr) const {
    const std::int64_t size = round_up(dim, lanes<T>);
    for (std::int64_t m = 0; m < columns; m += lanes<T>) {
      const T* from[lanes<T>];
      const std::int64_t count = clamp(queries - m, 0, lanes<T>);
      for (std::int64_t k = 0; k < count; ++k) from[k] = query_of(t, head, m + k);
      for (std::int64_t d = 0; d < dim; d += lanes<T>) {
        Vec<T> tile[lanes<T>]{};
        for (std::int64_t k = 0; k < count; ++k) tile[k] = load_up_to<T>(from[k] + d, dim - d) * scale;
        for (std::int64_t k = 0; rows && k < lanes<T>; ++k) store(rows + (m + k) * size + d, tile[k]);
        transpose<T>(tile);
        for (std::int64_t k = 0; k < clamp(dim - d, 0, lanes<T>); ++k)
          store(transposed + (d + k) * columns + m, tile[k]);
      }
    }
  }

  // Stages keys or values: the tile's rows of keys, of each the columns at the positions `across`. to: rows of `pitch`
  INR_NOINLINE void stage_keys(const Tokens& t, std::int64_t head, std::int64_t dim, Window across, R* to,
                               std::int64_t pitch) const {
    const std::int64_t size = round_up(dim, lanes<T>);
    for (std::int64_t i = y.keys.begin; i < y.keys.end; ++i, to += pitch)
      for (std::int64_t j = across.begin; j < across.end; ++j)
        stage_row(at(t, head, plan.y.key_at(y.residue, i), plan.x.key_at(x.residue, j)), dim, R(1),
                  to + (j - across.begin) * size);
  }

  // to[n][m] = sum_d rows[n][d] transposed[d][m]. rows: of the tile's keys, rows of `pitch`, each key round_up(dim)
  INR_NOINLINE void multiply(const R* rows, std::int64_t pitch, std::int64_t dim, const R* transposed, R* to) const {
    const std::int64_t size = round_up(dim, lanes<T>);
    for (std::int64_t n = 0; n < keys; n += across, rows += pitch)
      in_blocks<block_rows>(across, [&](std::int64_t c, auto Keys) {
        const R* from = rows + c * size;
        R* scores = to + (n + c) * columns;
        for (std::int64_t m = 0; m < columns; m += 2 * lanes<T>)
          if (columns - m > lanes<T>)
            multiply_block<Keys, 2>(from, size, transposed + m, columns, dim, scores + m);
          else
            multiply_block<Keys, 1>(from, size, transposed + m, columns, dim, scores + m);
      });
  }

  // Calls emit(m, d, sums, n) for every query m and some n channels d ...: sums = sum_n from[n][m] rows[n][d] over the
  // keys of m's window. rows: as in multiply
  template <class Emit>
  INR_NOINLINE void combine(const R* from, const R* rows, std::int64_t pitch, std::int64_t dim, Emit emit) const {
    const std::int64_t size = round_up(dim, lanes<T>), groups_x = x.count / group_x, group = group_y * group_x;
    R sums[max_queries * max_channels * lanes<T>];
    for (std::int64_t first = 0; first < queries; first += group) {
      const Window t = windows_y[first / group / groups_x], c = windows_x[first / group % groups_x];
      const R* weight = from + (t.begin * across + c.begin) * columns + first;
      in_blocks<max_channels>(size / lanes<T>, [&](std::int64_t v, auto V) {
        const Rectangle<R> values{rows + t.begin * pitch + c.begin * size + v * lanes<T>, pitch, size};
        in_blocks<max_queries>(group, [&](std::int64_t m, auto Queries) {
          const Rectangle<R> of_queries{weight + m, across * columns, columns};
          combine_block<Queries, V>(t.end - t.begin, c.end - c.begin, of_queries, values, sums);
          for (int q = 0; q < Queries; ++q) emit(first + m + q, v * lanes<T>, sums + q * V * lanes<T>, V * lanes<T>);
        });
      });
    }
  }

  // Writes the channels d ... d + n, but not those past the last, of one query. sums: [n]; to: [dim]
  static void write_channels(const R* sums, std::int64_t n, R factor, T* to, std::int64_t d, std::int64_t dim) {
    for (std::int64_t i = 0; i < n; i += lanes<T>) store_up_to<T>(load(sums + i) * factor, dim - d - i, to + d + i);
  }

  // Calls f(n, address of the lanes in [keys][columns], mask) for the lanes m ... of all keys; mask: which of them see it.
  template <class F>
  void for_each_key(std::int64_t m, F&& f) const {
    const std::int64_t vectors = columns / lanes<T>, v = m / lanes<T>;
    const Mask<T> all = Vec<T>{} == Vec<T>{};
    for (std::int64_t n = 0, t = 0; n < keys; ++t)
      for (std::int64_t c = 0; c < across; ++c, ++n)
        f(n, n * columns + m, uniform ? all : row_masks[t * vectors + v] & column_masks[c * vectors + v]);
  }

  // The bias of key n for lanes m ... of one head; the mask says for which there is one.
  Vec<T> bias(std::int64_t head, std::int64_t n, std::int64_t m, Mask<T> mask) const {
    Vec<T> values{};
    for (int k = 0; k < lanes<T>; ++k)
      if (mask[k] && m + k < queries) values[k] = static_cast<const R*>(p.bias)[bias_at(head, n, m + k)];
    return values;
  }
  std::int64_t bias_at(std::int64_t head, std::int64_t n, std::int64_t m) const {
    const std::int64_t step_y = y.keys.begin + n / across - plan.y.position(y.first + index_y[m]);
    const std::int64_t step_x = x.keys.begin + n % across - plan.x.position(x.first + index_x[m]);
    return (head * (2 * p.y.kernel - 1) + step_y + p.y.kernel - 1) * (2 * p.x.kernel - 1) + step_x + p.x.kernel - 1;
  }

  const TilePlan<T>& plan;
  const NeighborhoodAttention& p;
  std::int64_t image = 0, queries = 0, columns = 0, across = 0, keys = 0;  // columns: queries, rounded up
  Side y{}, x{};
  bool uniform = true;
  Buffer<R> query_columns;  // staged: [dim][columns]
  Buffer<R> weights;        // [keys][columns]

 private:
  T* at(const Tokens& t, std::int64_t head, std::int64_t row, std::int64_t column) const {
    const std::int64_t* s = t.strides;
    return static_cast<T*>(const_cast<void*>(t.data)) + image * s[0] + row * s[2] + column * s[3] + head * s[4];
  }
  static void stage_row(const T* from, std::int64_t dim, R scale, R* to) {
    for (std::int64_t d = 0; d < dim; d += lanes<T>) store(to + d, load_up_to<T>(from + d, dim - d) * scale);
  }
  // Orders the queries of a pattern by groups of one window.
  INR_NOINLINE void arrange() {
    queries = y.count * x.count;
    columns = round_up(queries, lanes<T> > product_rows ? lanes<T> : product_rows);
    across = x.keys.end - x.keys.begin;
    keys = (y.keys.end - y.keys.begin) * across;
    uniform = y.uniform && x.uniform;
    group_y = find_windows(plan.y, y, windows_y), group_x = find_windows(plan.x, x, windows_x);
    const std::int64_t groups_x = x.count / group_x, group = group_y * group_x;
    for (std::int64_t m = 0; m < queries; ++m) {
      index_y[m] = m / group / groups_x * group_y + m % group / group_x;
      index_x[m] = m / group % groups_x * group_x + m % group_x;
      steps_y[m] = plan.y.query_at(y.residue, y.first + index_y[m]) - first_y;
      steps_x[m] = plan.x.query_at(x.residue, x.first + index_x[m]) - first_x;
    }
    if (uniform) return;
    fill_masks(plan.y, y, index_y, row_masks);
    fill_masks(plan.x, x, index_x, column_masks);
  }
  // Finds the windows of a side's groups, relative to the side's keys, and returns the queries of a group.
  std::int64_t find_windows(const TiledAxis& axis, const Side& side, Window* windows) const {
    const std::int64_t group = side.uniform || side.count % axis.ratio ? side.count : axis.ratio;
    for (std::int64_t i = 0; i < side.count; i += group) {
      const std::int64_t begin = axis.window_of(side.residue, side.first + i).begin;
      const std::int64_t end = axis.window_of(side.residue, side.first + i + group - 1).end;
      windows[i / group] = {begin - side.keys.begin, end - side.keys.begin};
    }
    return group;
  }
  // masks: [keys of the side][columns]: which queries see a key. index: of the queries along the side
  void fill_masks(const TiledAxis& axis, const Side& side, const std::int64_t* index, Mask<T>* masks) const {
    for (std::int64_t m = 0; m < columns; ++m) {
      const Window w = axis.window_of(side.residue, side.first + (m < queries ? index[m] : 0));
      for (std::int64_t t = side.keys.begin; t < side.keys.end; ++t)
        masks[((t - side.keys.begin) * columns + m) / lanes<T>][m % lanes<T>] = t >= w.begin && t < w.end ? -1 : 0;
    }
  }

  std::int64_t first_y = 0, first_x = 0;    // the coordinates of the first query
  std::int64_t group_y = 1, group_x = 1;    // queries of a group of one window
  Buffer<std::int64_t> index_y, index_x;    // [columns]: the places of the queries along the sides
  Buffer<std::int64_t> steps_y, steps_x;    // [columns]: their coordinates, relative to the first query
  Buffer<Window> windows_y, windows_x;      // of the groups, relative to the keys of the tile
  Buffer<Mask<T>> row_masks, column_masks;  // [rows or columns of the keys][columns / lanes]
};

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
