// For the softmax weights P of query i and the keys t of its window, and their gradient P',
//
//   P' = grad_i . value_t,  S' = P (P' - sum_t P P' + grad_lse_i),  query' = scale sum_t S' key_t,
//   key'_t = scale sum_i S' query_i,  value'_t = sum_i P grad_i  over the queries i whose windows contain key t.
//
// A task owns rows of keys, and the same rows of queries. It visits every query row whose window contains one of its
// key rows, in order, and keeps the rows of P and S' that are still needed; then it sums over the queries of each key.
// Query rows at the border of two bands are therefore computed twice, no thread waits for another one, and the sums do
// not depend on how the rows are divided into bands.
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

  GradientRows(const NeighborhoodPlan<T>& plan)
      : NeighborhoodRows<T>(plan), layout{plan.offsets * plan.row_length, plan.row_length},
        slots(plan.max_span(queries_of_key) + max_rows), queries(slots, p.dim * plan.row_length),
        grads(slots, p.value_dim * plan.row_length), weights(slots, p.y.kernel * layout.key),
        score_gradients(slots, p.y.kernel * layout.key), windows_of(slots),
        bias_sums(max_rows * p.y.kernel * plan.offsets),
        shared_keys(shared_size(p.dim)), shared_values(shared_size(p.value_dim)) {}
  explicit operator bool() const {
    return NeighborhoodRows<T>::operator bool() && queries && grads && weights && score_gradients && windows_of &&
           bias_sums && shared_keys && shared_values;
  }

  // Computes P and S' of the query rows [i, i + count), and the gradients of the queries that the task owns.
  // lse, grad_lse: [batch, height, width, heads]; bias_rows: [batch, heads, height, y.kernel, offsets] or nullptr
  void add_query_rows(std::int64_t i, int count, const void* lse, const Tokens& grad_out, const void* grad_lse,
                     const Tokens& grad_query, R* bias_rows) {
    Window windows[max_rows];
    const R *query[max_rows], *grad[max_rows];
    for (int r = 0; r < count; ++r) {
      windows_of[(i + r) % slots] = windows[r] = window(p.y, i + r, this->n);
      this->stage(this->of_query(p.query), i + r, R(p.scale), queries[i + r]);
      this->stage(this->of_out(grad_out), i + r, R(1), grads[i + r]);
      query[r] = queries[i + r];
      grad[r] = grads[i + r];
    }
    this->stage_keys(windows[count - 1].end);
    if (bias_rows) clear(static_cast<Vec<T>*>(bias_sums), max_rows * p.y.kernel * plan.offsets);
    for (std::int64_t v = 0; v < plan.vectors; ++v) {
      const Neighbours<R>& neighbours = plan.key_neighbours[v];
      R *weight[max_rows], *score_gradient[max_rows];
      for (int r = 0; r < count; ++r) {
        const std::int64_t at = (neighbours.first + p.x.kernel - 1) * plan.row_length + (v + 1) * lanes<T>;
        weight[r] = weights[i + r] + at;
        score_gradient[r] = score_gradients[i + r] + at;
      }
      this->multiply_windows(count, windows, query, this->keys, p.dim, neighbours, v, weight, layout);
      this->multiply_windows(count, windows, grad, this->values, p.value_dim, neighbours, v, score_gradient, layout);
      for (int r = 0; r < count; ++r)
        softmax_backward(i + r, windows[r], weight[r], score_gradient[r], neighbours, v, static_cast<const R*>(lse),
                              static_cast<const R*>(grad_lse), bias_rows ? bias_sum(r) : nullptr);
      if (!grad_query.data) continue;
      this->clear_sums();
      this->combine_windows(count, windows, score_gradient, layout, this->keys, p.dim, neighbours, v);
      for (int r = 0; r < count; ++r)
        if (owns(i + r)) this->unstage(this->sum(r), Vec<T>{} + R(p.scale), this->of_query(grad_query), i + r, v);
    }
    for (int r = 0; bias_rows && r < count; ++r)
      if (owns(i + r)) store_bias(bias_sum(r), bias_rows + row_of_bias(i + r));
  }

  // Computes the gradients of the key rows [t, t + count), given S' as `scores` and the queries as `ring`; or of the
  // value rows, given P and the output's gradients. The heads that share them come one after another: `shared` holds
  // the sums of `position` earlier ones out of `heads`; the last writes `to`.
  void add_key_rows(std::int64_t t, int count, const ColumnNeighbours<R>& query_neighbours, const Ring<R>& scores,
                    const Ring<R>& ring, const Head& to, std::int64_t position, std::int64_t heads, R* shared) {
    const std::int64_t last = queries_of_key(p.y, t + count - 1, this->n).end, size = to.dim * lanes<T>;
    for (std::int64_t v = 0; v < plan.vectors; ++v) {
      const Neighbours<R>& neighbours = query_neighbours[v];
      // A query from which the key has offset o lies o steps before the key.
      const std::int64_t back = (v + 1) * lanes<T> - neighbours.first * p.x.dilation;
      const auto shared_sum = [&](int r) { return shared + ((t - task.begin + r) * plan.vectors + v) * size; };
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
        if (position + 1 < heads)
          std::memcpy(shared_sum(r), this->sum(r), std::size_t(size) * sizeof(R));
        else
          this->unstage(this->sum(r), Vec<T>{} + R(1), to, t + r, v);
    }
  }

  bool owns(std::int64_t i) const { return i >= task.begin && i < task.end; }

 private:
  // Replaces in `weight` the scores by P, and in `score_gradient` P' by S'. Both: `layout`, from the window's first row
  // and the first offset of vector v on; lse, grad_lse: [batch, height, width, heads]; bias_sums: [y.kernel][offsets]
  void softmax_backward(std::int64_t i, Window rows, R* weight, R* score_gradient, const Neighbours<R>& neighbours,
                             std::int64_t v, const R* lse, const R* grad_lse, Vec<T>* bias_sums) const {
    Vec<T> shift{}, mean{};
    const std::int64_t pixel = (task.image * p.y.length + this->y(i)) * p.x.length + v * lanes<T>;
    for (std::int64_t k = 0; k < clamp(p.x.length - v * lanes<T>, 0, lanes<T>); ++k) {
      shift[k] = lse[(pixel + k) * p.heads + task.head];
      if (grad_lse) mean[k] = -grad_lse[(pixel + k) * p.heads + task.head];
    }
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const R* bias = this->bias(i, t, neighbours);
      for (std::int64_t o = 0; o < neighbours.count; ++o) {
        const std::int64_t at = (t - rows.begin) * layout.key + o * layout.offset;
        const Vec<T> score = load(weight + at) - shift + (bias ? bias[o] : R(0));
        const Vec<T> w = masked<T>(exp_negative(score), neighbours.masks[o]);
        const Vec<T> d = masked<T>(load(score_gradient + at), neighbours.masks[o]);
        store(weight + at, w);
        store(score_gradient + at, d);
        mean += w * d;
      }
    }
    for (std::int64_t t = rows.begin; t < rows.end; ++t)
      for (std::int64_t o = 0; o < neighbours.count; ++o) {
        const std::int64_t at = (t - rows.begin) * layout.key + o * layout.offset;
        const Vec<T> d = load(weight + at) * (load(score_gradient + at) - mean);
        store(score_gradient + at, d);
        if (bias_sums) bias_sums[(t - rows.begin) * plan.offsets + neighbours.first + o + p.x.kernel - 1] += d;
      }
  }

  // Sums over the lanes. from, to: [y.kernel][offsets]
  void store_bias(const Vec<T>* from, R* to) const {
    for (std::int64_t k = 0; k < p.y.kernel * plan.offsets; ++k) {
      to[k] = 0;
      for (int lane = 0; lane < lanes<T>; ++lane) to[k] += from[k][lane];
    }
  }
  Vec<T>* bias_sum(int r) { return bias_sums + r * p.y.kernel * plan.offsets; }

  // The offset in bias_rows of the contribution of query row i to the bias's gradient.
  std::int64_t row_of_bias(std::int64_t i) const {
    return ((task.image * p.heads + task.head) * p.y.length + this->y(i)) * p.y.kernel * plan.offsets;
  }

  // Of the sums of a task's keys, which its heads share; none if there is one head.
  std::int64_t shared_size(std::int64_t dim) const {
    return plan.heads > 1 ? plan.band_rows * plan.vectors * dim * lanes<T> : 0;
  }

  ScoreLayout layout;
  std::int64_t slots;

 public:
  Ring<R> queries, grads;            // rows of [dim][row_length]
  Ring<R> weights, score_gradients;  // rows of [y.kernel][offsets][row_length]: P, S'
  Buffer<Window> windows_of;         // [slots]
  Buffer<Vec<T>> bias_sums;          // [max_rows][y.kernel][offsets]
  Buffer<R> shared_keys, shared_values;  // [band_rows][vectors][dim][lanes]
};

// Sums the contributions of all rows in a fixed order.
// rows: [batch, heads, height, y.kernel, offsets]; bias: [heads, 2 y.kernel - 1, offsets]
template <class R>
void sum_bias(const NeighborhoodAttention& p, const R* rows, R* bias) {
  const std::int64_t height = 2 * p.y.kernel - 1, width = 2 * p.x.kernel - 1;
  clear(bias, p.heads * height * width);
  for (std::int64_t line = 0; line < p.batch * p.heads * p.y.length; ++line) {
    const std::int64_t y = line % p.y.length, head = line / p.y.length % p.heads, i = y / p.y.dilation;
    const Window w = window(p.y, i, class_size(p.y, y % p.y.dilation));
    const R* from = rows + line * p.y.kernel * width;
    R* to = bias + (head * height + w.begin - i + p.y.kernel - 1) * width;
    for (std::int64_t k = 0; k < (w.end - w.begin) * width; ++k) to[k] += from[k];
  }
}

// lse, grad_lse: [batch, height, width, heads]; grad_lse may be nullptr
template <class T>
Status backward(const NeighborhoodAttention& p, const void* lse, const Tokens& grad_out, const void* grad_lse,
                const NeighborhoodAttentionGradients& to) {
  using R = Real<T>;
  // A task computes the heads that share keys or values.
  const NeighborhoodPlan<T> plan(p, p.heads / std::gcd(p.key_heads, p.value_heads));
  const ColumnNeighbours<R> query_neighbours(p.x, true);
  Buffer<R> bias_rows;
  if (to.bias && !bias_rows.resize(p.batch * p.heads * p.y.length * p.y.kernel * plan.offsets))
    return Status::out_of_memory;
  if (!plan.key_neighbours || !query_neighbours) return Status::out_of_memory;
  const bool needs_keys = to.key.data || to.value.data;
  const std::int64_t key_share = p.heads / p.key_heads, value_share = p.heads / p.value_heads;
  const Status status = for_each_band<GradientRows<T>>(plan, [&](GradientRows<T>& rows) {
    NeighborhoodTask task = rows.task;
    for (const std::int64_t end = task.head + plan.heads; task.head < end; ++task.head) {
      rows.begin(task);
      std::int64_t next = needs_keys ? queries_of_key(p.y, task.begin, rows.n).begin : task.begin;
      rows.staged = window(p.y, next, rows.n).begin;
      for (std::int64_t t = task.begin; t < task.end; t += max_rows) {
        const int count = int(clamp(task.end - t, 0, max_rows));
        const std::int64_t needed = needs_keys ? queries_of_key(p.y, t + count - 1, rows.n).end : t + count;
        for (; next < needed; next += max_rows)
          rows.add_query_rows(next, int(clamp(rows.n - next, 0, max_rows)), lse, grad_out, grad_lse, to.query,
                              bias_rows);
        if (to.key.data)
          rows.add_key_rows(t, count, query_neighbours, rows.score_gradients, rows.queries, rows.of_key(to.key),
                            task.head % key_share, key_share, rows.shared_keys);
        if (to.value.data)
          rows.add_key_rows(t, count, query_neighbours, rows.weights, rows.grads, rows.of_value(to.value),
                            task.head % value_share, value_share, rows.shared_values);
      }
    }
  });
  if (status == Status::ok && to.bias) sum_bias(p, static_cast<const R*>(bias_rows), static_cast<R*>(to.bias));
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
