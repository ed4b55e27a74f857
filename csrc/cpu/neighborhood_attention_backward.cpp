// With P the weights and P' their gradient, of a query i and the keys t of its window,
//
//   P' = grad_i . value_t,  S' = P (P' - sum_t P P' + grad_lse_i),  query' = scale sum_t S' key_t,
//   key'_t = scale sum_i S' query_i,  value'_t = sum_i P grad_i  over the queries that see key t.
//
// A task owns rows of keys, and the same rows of queries. It goes through every query row that sees one of its keys, in
// order, and keeps the rows of P and S' that are still needed; then each key gathers. So two bands compute the rows
// between them twice, nobody waits, and the sums do not depend on the cut.
#include "neighborhood_attention.h"

namespace inr {
namespace INR_ISA {
namespace {

template <class T>
class BackwardRows : public Rows<T> {
 public:
  using R = Real<T>;
  using Rows<T>::p;
  using Rows<T>::plan;
  using Rows<T>::task;

  BackwardRows(const Plan<T>& plan)
      : Rows<T>(plan), layout{plan.width * plan.row, plan.row}, slots(plan.most(viewers) + most_rows),
        queries(slots, p.dim * plan.row), grads(slots, p.dim * plan.row), weights(slots, p.y.kernel * layout.key),
        slopes(slots, p.y.kernel * layout.key), rows_of(slots), bias_sums(most_rows * p.y.kernel * plan.width) {}
  explicit operator bool() const {
    return Rows<T>::operator bool() && queries && grads && weights && slopes && rows_of && bias_sums;
  }

  // Query rows [i, i + count): their weights and slopes and, of those that the task owns, their gradients.
  void differentiate(std::int64_t i, int count, const void* lse, const Tokens& grad_out, const void* grad_lse,
                     const Tokens& grad_query, R* bias_rows) {
    Window windows[most_rows];
    const R *query[most_rows], *grad[most_rows];
    for (int r = 0; r < count; ++r) {
      rows_of[(i + r) % slots] = windows[r] = window(p.y, i + r, this->n);
      this->stage(p.query, i + r, R(p.scale), queries[i + r]);
      this->stage(grad_out, i + r, R(1), grads[i + r]);
      query[r] = queries[i + r];
      grad[r] = grads[i + r];
    }
    this->stage_keys(windows[count - 1].end);
    if (bias_rows) clear(static_cast<Vec<T>*>(bias_sums), most_rows * p.y.kernel * plan.width);
    for (std::int64_t v = 0; v < plan.vectors; ++v) {
      const Partners<R>& partners = plan.keys_of[v];
      R *weight[most_rows], *slope[most_rows];
      for (int r = 0; r < count; ++r) {
        const std::int64_t at = (partners.first + p.x.kernel - 1) * plan.row + (v + 1) * lanes<T>;
        weight[r] = weights[i + r] + at;
        slope[r] = slopes[i + r] + at;
      }
      this->multiply_windows(count, windows, query, this->keys, partners, v, weight, layout);
      this->multiply_windows(count, windows, grad, this->values, partners, v, slope, layout);
      for (int r = 0; r < count; ++r)
        differentiate_softmax(i + r, windows[r], weight[r], slope[r], partners, v, static_cast<const R*>(lse),
                              static_cast<const R*>(grad_lse), bias_rows ? bias_sum(r) : nullptr);
      if (!grad_query.data) continue;
      this->clear_sums();
      this->combine_windows(count, windows, slope, layout, this->keys, partners, v);
      for (int r = 0; r < count; ++r)
        if (owns(i + r)) this->unstage(this->sum(r), Vec<T>{} + R(p.scale), grad_query, i + r, v);
    }
    for (int r = 0; bias_rows && r < count; ++r)
      if (owns(i + r)) store_bias(bias_sum(r), bias_rows + row_of_bias(i + r));
  }

  // The gradients of the key rows [t, t + count), of rows `scores` of slopes or weights and of queries or their grads.
  void gather(std::int64_t t, int count, const Columns<R>& queries_of, const Ring<R>& scores, const Ring<R>& ring,
              const Tokens& to) {
    const std::int64_t last = viewers(p.y, t + count - 1, this->n).end;
    for (std::int64_t v = 0; v < plan.vectors; ++v) {
      const Partners<R>& partners = queries_of[v];
      // A query that sees the key from `offset` lies as many steps back.
      const std::int64_t back = (v + 1) * lanes<T> - partners.first * p.x.dilation;
      this->clear_sums();
      for (std::int64_t i = viewers(p.y, t, this->n).begin; i < last; ++i) {
        const Window w = rows_of[i % slots];
        const int first = int(clamp(w.begin - t, 0, count)), end = int(clamp(w.end - t, 0, count));
        const R* from[most_rows];
        for (int r = first; r < end; ++r)
          from[r - first] =
              scores[i] + (t + r - w.begin) * layout.key + (partners.first + p.x.kernel - 1) * plan.row + back;
        this->combine_rows(first, end - first, from, plan.row - p.x.dilation, ring[i] + back, -p.x.dilation, partners);
      }
      for (int r = 0; r < count; ++r) this->unstage(this->sum(r), Vec<T>{} + R(1), to, t + r, v);
    }
  }

  bool owns(std::int64_t i) const { return i >= task.begin && i < task.end; }

 private:
  // weight: scores -> P; slope: P' -> S'.
  void differentiate_softmax(std::int64_t i, Window rows, R* weight, R* slope, const Partners<R>& partners,
                             std::int64_t v, const R* lse, const R* grad_lse, Vec<T>* bias_sums) const {
    Vec<T> shift{}, mean{};
    const std::int64_t pixel = (task.image * p.y.length + this->y(i)) * p.x.length + v * lanes<T>;
    for (std::int64_t k = 0; k < clamp(p.x.length - v * lanes<T>, 0, lanes<T>); ++k) {
      shift[k] = lse[(pixel + k) * p.heads + task.head];
      if (grad_lse) mean[k] = -grad_lse[(pixel + k) * p.heads + task.head];
    }
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const R* bias = this->bias(i, t, partners);
      for (std::int64_t o = 0; o < partners.count; ++o) {
        const std::int64_t at = (t - rows.begin) * layout.key + o * layout.offset;
        const Vec<T> score = load(weight + at) - shift + (bias ? bias[o] : R(0));
        const Vec<T> w = masked<T>(exp_negative(score), partners.masks[o]);
        const Vec<T> d = masked<T>(load(slope + at), partners.masks[o]);
        store(weight + at, w);
        store(slope + at, d);
        mean += w * d;
      }
    }
    for (std::int64_t t = rows.begin; t < rows.end; ++t)
      for (std::int64_t o = 0; o < partners.count; ++o) {
        const std::int64_t at = (t - rows.begin) * layout.key + o * layout.offset;
        const Vec<T> d = load(weight + at) * (load(slope + at) - mean);
        store(slope + at, d);
        if (bias_sums) bias_sums[(t - rows.begin) * plan.width + partners.first + o + p.x.kernel - 1] += d;
      }
  }

  void store_bias(const Vec<T>* from, R* to) const {
    for (std::int64_t k = 0; k < p.y.kernel * plan.width; ++k) {
      to[k] = 0;
      for (int lane = 0; lane < lanes<T>; ++lane) to[k] += from[k][lane];
    }
  }
  Vec<T>* bias_sum(int r) { return bias_sums + r * p.y.kernel * plan.width; }

  // bias_rows: [batch, heads, height, kernel, width], a row of queries' share of the bias's gradient
  std::int64_t row_of_bias(std::int64_t i) const {
    return ((task.image * p.heads + task.head) * p.y.length + this->y(i)) * p.y.kernel * plan.width;
  }

  Layout layout;
  std::int64_t slots;

 public:
  Ring<R> queries, grads;   // [dim][row]
  Ring<R> weights, slopes;  // [kernel][width][row]: P, S'
  Buffer<Window> rows_of;   // [slots]
  Buffer<Vec<T>> bias_sums;  // [most_rows][kernel][width]
};

// Adds up the rows' shares, always in the same order.
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

template <class T>
Status backward(const NeighborhoodAttention& p, const void* lse, const Tokens& grad_out, const void* grad_lse,
                const NeighborhoodAttentionGradients& to) {
  using R = Real<T>;
  const Plan<T> plan(p);
  const Columns<R> queries_of(p.x, true);
  Buffer<R> bias_rows;
  if (to.bias && !bias_rows.resize(p.batch * p.heads * p.y.length * p.y.kernel * plan.width))
    return Status::out_of_memory;
  if (!plan.keys_of || !queries_of) return Status::out_of_memory;
  const bool gathers = to.key.data || to.value.data;
  const Status status = for_each_run<BackwardRows<T>>(plan, [&](BackwardRows<T>& rows) {
    std::int64_t next = gathers ? viewers(p.y, rows.task.begin, rows.n).begin : rows.task.begin;
    rows.staged = window(p.y, next, rows.n).begin;
    for (std::int64_t t = rows.task.begin; t < rows.task.end; t += most_rows) {
      const int count = int(clamp(rows.task.end - t, 0, most_rows));
      const std::int64_t needed = gathers ? viewers(p.y, t + count - 1, rows.n).end : t + count;
      for (; next < needed; next += most_rows)
        rows.differentiate(next, int(clamp(rows.n - next, 0, most_rows)), lse, grad_out, grad_lse, to.query, bias_rows);
      if (to.key.data) rows.gather(t, count, queries_of, rows.slopes, rows.queries, to.key);
      if (to.value.data) rows.gather(t, count, queries_of, rows.weights, rows.grads, to.value);
    }
  });
  if (status == Status::ok && to.bias) sum_bias(p, static_cast<const R*>(bias_rows), static_cast<R*>(to.bias));
  return status;
}

}  // namespace

Status neighborhood_attention_backward(Type type, const NeighborhoodAttention& p, const void* lse,
                                       const Tokens& grad_out, const void* grad_lse,
                                       const NeighborhoodAttentionGradients& to) {
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
