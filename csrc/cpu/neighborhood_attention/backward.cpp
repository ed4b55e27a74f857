// For the softmax weights P of query i and the keys t of its window, and their gradient P',
//
//   P' = grad_i . value_t,  S' = P (P' - sum_t P P' + grad_lse_i),  query' = scale sum_t S' key_t,
//   key'_t = scale sum_i S' query_i,  value'_t = sum_i P grad_i  over the queries i whose windows contain key t.
//
// A task owns rows of keys, of long rows a segment, and the queries at the same positions. It visits every query row
// whose window contains one of its key rows, in order, and keeps the rows of P and S' that are still needed; then it
// sums over the queries of each key. Queries at the border of two bands or segments are therefore computed twice, no
// thread waits for another one, and the sums of keys and values do not depend on the division; that of the bias depends
// on the segments, but not on the number of threads.
//
// In three dimensions, a key plane would need all key planes of its query planes. So there are two passes: one over the
// queries, which also stores sum_t P P' - grad_lse_i, and one over the keys, in which each query plane is visited with
// one key plane.
#include <numeric>

#include "common.h"
#include "tiles.h"

namespace inr {
namespace INR_ISA {
namespace {

template <class T>
class GradientRows : public NeighborhoodRows<T> {
 public:
  using R = Real<T>;
  using NeighborhoodRows<T>::p;
  using NeighborhoodRows<T>::plan;
  using NeighborhoodRows<T>::task;

  // max_planes: of the keys. needs_history: whether keys gather from the rows of queries.
  GradientRows(const NeighborhoodPlan<T>& plan, std::int64_t max_planes, bool needs_history)
      : NeighborhoodRows<T>(plan, max_planes), layout{plan.offsets * plan.row_length, plan.row_length},
        slots(clamp((needs_history ? plan.max_span(queries_of_key) : 0) + max_rows, 0, class_size(p.y, 0))),
        score_rows(p.y.kernel * max_planes),
        queries(slots, p.dim * plan.row_length), grads(slots, p.value_dim * plan.row_length),
        weights(slots, score_rows * layout.key), score_gradients(slots, score_rows * layout.key), windows_of(slots),
        bias_sums(max_rows * score_rows * plan.offsets),
        shared_keys(shared_size(p.dim)), shared_values(shared_size(p.value_dim)) {}
  explicit operator bool() const {
    return NeighborhoodRows<T>::operator bool() && queries && grads && weights && score_gradients && windows_of &&
           bias_sums && shared_keys && shared_values;
  }

  // Computes P and S' of the query rows [i, i + count), and the gradients of the queries that the task owns.
  // lse, grad_lse, means: [batch, depth, height, width, heads], means are sum_t P P' - grad_lse, stored or, if
  // `has_means`, read; bias_rows: [batch, heads, depth, height, parts, y.kernel, z.kernel, offsets]; nullptr for none
  void add_query_rows(std::int64_t i, int count, const void* lse, const Tokens& grad_out, const void* grad_lse,
                     const Tokens& grad_query, R* means, bool has_means, R* bias_rows) {
    Window windows[max_rows];
    const R *query[max_rows], *grad[max_rows];
    for (int r = 0; r < count; ++r) {
      windows_of[(i + r) % slots] = windows[r] = window(p.y, i + r, this->n);
      const Window columns = task.columns.queries;
      this->stage(this->of_query(p.query), this->depth, i + r, columns, R(p.scale), queries[i + r]);
      this->stage(this->of_out(grad_out), this->depth, i + r, columns, R(1), grads[i + r]);
      query[r] = queries[i + r];
      grad[r] = grads[i + r];
    }
    this->stage_keys(windows[count - 1].end);
    if (bias_rows) clear(static_cast<Vec<T>*>(bias_sums), max_rows * score_rows * plan.offsets);
    for (std::int64_t v = task.columns.queries.begin; v < task.columns.queries.end; ++v) {
      const bool own = v >= task.columns.own.begin && v < task.columns.own.end;
      const Neighbours<R>& neighbours = plan.key_neighbours[v];
      R *weight[max_rows], *score_gradient[max_rows];
      for (int r = 0; r < count; ++r) {
        const std::int64_t at = (neighbours.first + p.x.kernel - 1) * plan.row_length + this->column(v);
        weight[r] = weights[i + r] + at;
        score_gradient[r] = score_gradients[i + r] + at;
      }
      this->multiply_windows(count, windows, query, this->keys, p.dim, neighbours, v, weight, layout);
      this->multiply_windows(count, windows, grad, this->values, p.value_dim, neighbours, v, score_gradient, layout);
      for (int r = 0; r < count; ++r)
        softmax_backward(i + r, windows[r], weight[r], score_gradient[r], neighbours, v, static_cast<const R*>(lse),
                         static_cast<const R*>(grad_lse), means, has_means,
                         bias_rows && own ? bias_sum(r) : nullptr);
      if (!grad_query.data || !own) continue;
      this->clear_sums();
      this->combine_windows(count, windows, score_gradient, layout, this->keys, p.dim, neighbours, v);
      for (int r = 0; r < count; ++r)
        if (owns(i + r))
          this->unstage(this->sum(r), Vec<T>{} + R(p.scale), this->of_query(grad_query), this->depth, i + r, v);
    }
    for (int r = 0; bias_rows && r < count; ++r)
      if (owns(i + r)) store_bias(bias_sum(r), bias_rows + row_of_bias(i + r));
  }

  // Computes the gradients of the key rows [t, t + count), given S' as `scores` and the queries as `ring`; or of the
  // value rows, given P and the output's gradients. The heads that share them, and planes of queries, come one after
  // another: `shared` holds the sums of `position` earlier ones out of `parts`; the last writes `to`.
  void add_key_rows(std::int64_t t, int count, const ColumnNeighbours<R>& query_neighbours, const Ring<R>& scores,
                    const Ring<R>& ring, const Head& to, std::int64_t position, std::int64_t parts, R* shared) {
    const std::int64_t last = queries_of_key(p.y, t + count - 1, this->n).end, size = to.dim * lanes<T>;
    for (std::int64_t v = task.columns.own.begin; v < task.columns.own.end; ++v) {
      const Neighbours<R>& neighbours = query_neighbours[v];
      // A query from which the key has offset o lies o steps before the key.
      const std::int64_t back = this->column(v) - neighbours.first * p.x.dilation;
      const auto shared_sum = [&](int r) {
        return shared + ((t - task.begin + r) * plan.vectors + v - task.columns.own.begin) * size;
      };
      this->clear_sums();
      for (int r = 0; position && r < count; ++r)
        std::memcpy(this->sum(r), shared_sum(r), std::size_t(size) * sizeof(R));
      for (std::int64_t i = queries_of_key(p.y, t, this->n).begin; i < last; ++i) {
        const Window w = windows_of[i % slots];
        const int first = int(clamp(w.begin - t, 0, count)), end = int(clamp(w.end - t, 0, count));
        const R* from[max_rows];
        for (int r = first; r < end; ++r)
          from[r - first] =
              scores[i] + (t + r - w.begin) * layout.key + (neighbours.first + p.x.kernel - 1) * plan.row_length + back;
        this->combine_rows(first, end - first, from, plan.row_length - p.x.dilation, ring[i] + back, -p.x.dilation,
                           to.dim, neighbours);
      }
      for (int r = 0; r < count; ++r)
        if (position + 1 < parts)
          std::memcpy(shared_sum(r), this->sum(r), std::size_t(size) * sizeof(R));
        else
          this->unstage(this->sum(r), Vec<T>{} + R(1), to, task.depth, t + r, v);
    }
  }

  bool owns(std::int64_t i) const { return i >= task.begin && i < task.end; }

 private:
  // Replaces in `weight` the scores by P, and in `score_gradient` P' by S'. Both: `layout`, from the window's first row
  // and the first offset of vector v on; lse, grad_lse, means: as in `add_query_rows`; bias_sums: [key][offsets]
  void softmax_backward(std::int64_t i, Window rows, R* weight, R* score_gradient, const Neighbours<R>& neighbours,
                             std::int64_t v, const R* lse, const R* grad_lse, R* means, bool has_means,
                             Vec<T>* bias_sums) const {
    Vec<T> shift{}, mean{}, sum{};
    const std::int64_t pixel = this->pixel(i, v), columns = clamp(p.x.length - v * lanes<T>, 0, lanes<T>);
    for (std::int64_t k = 0; k < columns; ++k) {
      const std::int64_t at = (pixel + k) * p.heads + task.head;
      shift[k] = lse[at];
      if (has_means)
        mean[k] = means[at];
      else if (grad_lse)
        mean[k] = -grad_lse[at];
    }
    const std::int64_t count = (rows.end - rows.begin) * this->plane_count();
    for (std::int64_t n = 0; n < count; ++n) {
      const R* bias = this->bias(i, rows, n, neighbours);
      for (std::int64_t o = 0; o < neighbours.count; ++o) {
        const std::int64_t at = n * layout.key + o * layout.offset;
        const Vec<T> score = load(weight + at) - shift + (bias ? bias[o] : R(0));
        const Vec<T> w = masked<T>(exp_negative(score), neighbours.masks[o]);
        const Vec<T> d = masked<T>(load(score_gradient + at), neighbours.masks[o]);
        store(weight + at, w);
        store(score_gradient + at, d);
        sum += w * d;
      }
    }
    if (!has_means) mean += sum;
    for (std::int64_t k = 0; means && !has_means && k < columns; ++k)
      means[(pixel + k) * p.heads + task.head] = mean[k];
    for (std::int64_t n = 0; n < count; ++n)
      for (std::int64_t o = 0; o < neighbours.count; ++o) {
        const std::int64_t at = n * layout.key + o * layout.offset;
        const Vec<T> d = load(weight + at) * (load(score_gradient + at) - mean);
        store(score_gradient + at, d);
        if (bias_sums) bias_sums[n * plan.offsets + neighbours.first + o + p.x.kernel - 1] += d;
      }
  }

  // Sums over the lanes. from, to: [y.kernel][z.kernel][offsets]
  void store_bias(const Vec<T>* from, R* to) const {
    for (std::int64_t k = 0; k < score_rows * plan.offsets; ++k) {
      to[k] = 0;
      for (int lane = 0; lane < lanes<T>; ++lane) to[k] += from[k][lane];
    }
  }
  Vec<T>* bias_sum(int r) { return bias_sums + r * score_rows * plan.offsets; }

  // The offset in bias_rows of the contribution of query row i to the bias's gradient.
  std::int64_t row_of_bias(std::int64_t i) const {
    const std::int64_t plane = (task.image * p.heads + task.head) * p.z.length + task.depth;
    return ((plane * p.y.length + this->y(i)) * plan.parts + task.part) * score_rows * plan.offsets;
  }

  // Of the sums of a task's keys, which its heads and planes of queries share; none if there is one of each.
  std::int64_t shared_size(std::int64_t dim) const {
    return plan.heads > 1 || p.z.length > 1 ? plan.band_rows * plan.vectors * dim * lanes<T> : 0;
  }

  ScoreLayout layout;
  std::int64_t slots, score_rows;  // score_rows: rows of keys and their planes

 public:
  Ring<R> queries, grads;            // rows of [dim][row_length]
  Ring<R> weights, score_gradients;  // rows of [y.kernel][planes][offsets][row_length]: P, S'
  Buffer<Window> windows_of;         // [slots]
  Buffer<Vec<T>> bias_sums;          // [max_rows][y.kernel][planes][offsets]
  Buffer<R> shared_keys, shared_values;  // [band_rows][vectors][dim][lanes]
};

// Sums the contributions of all rows in a fixed order.
// rows: [batch, heads, depth, height, parts, y.kernel, planes, offsets]
// bias: [heads, 2 z.kernel - 1, 2 y.kernel - 1, offsets]
template <class R>
void sum_bias(const NeighborhoodAttention& p, std::int64_t parts, const R* rows, R* bias) {
  const std::int64_t depth = 2 * p.z.kernel - 1, height = 2 * p.y.kernel - 1, width = 2 * p.x.kernel - 1;
  clear(bias, p.heads * depth * height * width);
  for (std::int64_t line = 0; line < p.batch * p.heads * p.z.length * p.y.length; ++line) {
    const std::int64_t y = line % p.y.length, z = line / p.y.length % p.z.length, i = y / p.y.dilation;
    const std::int64_t head = line / p.y.length / p.z.length % p.heads, plane = z / p.z.dilation;
    const Window w = window(p.y, i, class_size(p.y, y % p.y.dilation));
    const Window planes = window(p.z, plane, class_size(p.z, z % p.z.dilation));
    for (std::int64_t part = line * parts; part < (line + 1) * parts; ++part) {
      const R* from = rows + part * p.y.kernel * p.z.kernel * width;
      for (std::int64_t t = w.begin; t < w.end; ++t)
        for (std::int64_t s = planes.begin; s < planes.end; ++s, from += width) {
          const std::int64_t at = (head * depth + s - plane + p.z.kernel - 1) * height + t - i + p.y.kernel - 1;
          for (std::int64_t k = 0; k < width; ++k) bias[at * width + k] += from[k];
        }
    }
  }
}

// lse, grad_lse: [batch, depth, height, width, heads]; grad_lse may be nullptr
template <class T>
Status backward(const NeighborhoodAttention& p, const void* lse, const Tokens& grad_out, const void* grad_lse,
                const NeighborhoodAttentionGradients& to) {
  using R = Real<T>;
  const bool needs_keys = to.key.data || to.value.data, in_passes = p.z.length > 1;
  Buffer<R> bias_rows, means;
  std::int64_t parts = 1;  // of bias_rows
  const std::int64_t lines = p.batch * p.heads * p.z.length * p.y.length;
  if (in_passes && !means.resize(lines * p.x.length)) return Status::out_of_memory;
  const std::int64_t key_share = p.heads / p.key_heads, value_share = p.heads / p.value_heads;
  // of_queries, of_keys: whether to compute the gradients of queries and bias, and of keys and values
  const auto pass = [&](bool of_queries, bool of_keys) {
    const ColumnNeighbours<R> query_neighbours(p.x, true);
    if (!query_neighbours) return Status::out_of_memory;
    const std::int64_t planes = of_keys ? 1 : p.z.kernel, scores = 2 * p.y.kernel * planes * (2 * p.x.kernel - 1);
    const std::int64_t rows_of_queries = clamp(p.y.kernel + max_rows - 1, 0, p.y.length);
    // A task computes the heads that share keys or values.
    const NeighborhoodPlan<T> plan(p, of_keys ? p.heads / std::gcd(p.key_heads, p.value_heads) : 1,
                                   rows_of_queries * ((planes + 1) * (p.dim + p.value_dim) + scores),
                                   of_keys ? &query_neighbours : nullptr);
    if (!plan) return Status::out_of_memory;
    if (of_queries) parts = plan.parts;
    if (of_queries && to.bias && !bias_rows.resize(lines * parts * p.y.kernel * p.z.kernel * plan.offsets))
      return Status::out_of_memory;
    const auto make = [&] { return GradientRows<T>(plan, planes, of_keys); };
    // The gradients of the task's head, by the queries of one plane: of the task's own, or number `plane` of `planes`.
    const auto add_plane = [&](GradientRows<T>& rows, std::int64_t plane, std::int64_t planes) {
      const NeighborhoodTask& task = rows.task;
      std::int64_t next = of_keys ? queries_of_key(p.y, task.begin, rows.n).begin : task.begin;
      rows.staged = window(p.y, next, rows.n).begin;
      for (std::int64_t t = task.begin; t < task.end; t += max_rows) {
        const int count = int(clamp(task.end - t, 0, max_rows));
        const std::int64_t needed = of_keys ? queries_of_key(p.y, t + count - 1, rows.n).end : t + count;
        for (; next < needed; next += max_rows)
          rows.add_query_rows(next, int(clamp(rows.n - next, 0, max_rows)), lse, grad_out, grad_lse,
                              of_queries ? to.query : Tokens{}, means, !of_queries,
                              of_queries ? static_cast<R*>(bias_rows) : nullptr);
        if (of_keys && to.key.data)
          rows.add_key_rows(t, count, query_neighbours, rows.score_gradients, rows.queries, rows.of_key(to.key),
                            task.head % key_share * planes + plane, key_share * planes, rows.shared_keys);
        if (of_keys && to.value.data)
          rows.add_key_rows(t, count, query_neighbours, rows.weights, rows.grads, rows.of_value(to.value),
                            task.head % value_share * planes + plane, value_share * planes, rows.shared_values);
      }
    };
    return for_each_band(plan, make, [&](GradientRows<T>& rows) {
      NeighborhoodTask task = rows.task;
      const std::int64_t residue = task.depth % p.z.dilation, at = task.depth / p.z.dilation;
      const Window of_key = queries_of_key(p.z, at, class_size(p.z, residue));
      for (const std::int64_t end = task.head + plan.heads; task.head < end; ++task.head) {
        rows.begin(task);
        if (of_queries) {
          add_plane(rows, 0, 1);
          continue;
        }
        rows.planes = {at, at + 1};
        for (std::int64_t z = of_key.begin; z < of_key.end; ++z) {
          rows.depth = residue + z * p.z.dilation;
          add_plane(rows, z - of_key.begin, of_key.end - of_key.begin);
        }
      }
    });
  };
  Status status = pass(true, needs_keys && !in_passes);
  if (status == Status::ok && needs_keys && in_passes) status = pass(false, true);
  if (status == Status::ok && to.bias) sum_bias(p, parts, static_cast<const R*>(bias_rows), static_cast<R*>(to.bias));
  return status;
}

}  // namespace

Status neighborhood_attention_backward(Type type, const NeighborhoodAttention& p, const void* lse,
                                       const Tokens& grad_out, const void* grad_lse,
                                       const NeighborhoodAttentionGradients& to) {
  if (needs_tiles(p)) return tiled_backward(type, p, lse, grad_out, grad_lse, to);
  switch (type) {
    case Type::float32: return backward<float>(p, lse, grad_out, grad_lse, to);
    case Type::float64: return backward<double>(p, lse, grad_out, grad_lse, to);
    case Type::bfloat16: return backward<bf16>(p, lse, grad_out, grad_lse, to);
    case Type::float16: return backward<f16>(p, lse, grad_out, grad_lse, to);
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
