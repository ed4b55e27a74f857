#include "common.h"
#include "tiles.h"

namespace inr {
namespace INR_ISA {
namespace {

template <class T>
class QueryRows : public NeighborhoodRows<T> {
 public:
  using R = Real<T>;
  using NeighborhoodRows<T>::p;
  using NeighborhoodRows<T>::plan;

  explicit QueryRows(const NeighborhoodPlan<T>& plan)
      : NeighborhoodRows<T>(plan, plan.p.z.kernel), queries(max_rows, p.dim * plan.row_length),
        layout{plan.offsets * lanes<T>, lanes<T>}, scores(max_rows * score_rows() * layout.key) {}
  explicit operator bool() const { return NeighborhoodRows<T>::operator bool() && queries && scores; }

  // Computes the rows [i, i + count) of the output and of lse. lse: [batch, depth, height, width, heads] or nullptr
  void attend(std::int64_t i, int count, const Tokens& out, R* lse) {
    Window windows[max_rows];
    const R* query[max_rows];
    R* score[max_rows];
    for (int r = 0; r < count; ++r) {
      windows[r] = window(p.y, i + r, this->n);
      score[r] = scores + r * score_rows() * layout.key;
      query[r] = queries[r];
      this->stage(this->of_query(p.query), this->depth, i + r, this->task.columns.own, R(p.scale), queries[r]);
    }
    this->stage_keys(windows[count - 1].end);
    for (std::int64_t v = this->task.columns.own.begin; v < this->task.columns.own.end; ++v) {
      const Neighbours<R>& neighbours = plan.key_neighbours[v];
      this->multiply_windows(count, windows, query, this->keys, p.dim, neighbours, v, score, layout);
      Vec<T> total[max_rows];
      for (int r = 0; r < count; ++r) total[r] = softmax(i + r, windows[r], score[r], neighbours, v, lse);
      this->clear_sums();
      this->combine_windows(count, windows, score, layout, this->values, p.value_dim, neighbours, v);
      for (int r = 0; r < count; ++r)
        this->unstage(this->sum(r), R(1) / total[r], this->of_out(out), this->depth, i + r, v);
    }
  }

 private:
  std::int64_t score_rows() const { return p.y.kernel * p.z.kernel; }

  // Replaces the scores of row i by exp(score - maximum), writes lse, and returns the sum of the exponentials.
  // score: `layout`, from the window's first row and the first offset of vector v on
  Vec<T> softmax(std::int64_t i, Window rows, R* score, const Neighbours<R>& neighbours, std::int64_t v, R* lse) const {
    const Vec<T> minus_infinity = Vec<T>{} - R(__builtin_inf());
    Vec<T> maximum = minus_infinity, sum{};
    const std::int64_t count = (rows.end - rows.begin) * this->plane_count();
    for (std::int64_t k = 0; k < count; ++k) {
      const R* bias = this->bias(i, rows, k, neighbours);
      R* s = score + k * layout.key;
      for (std::int64_t o = 0; o < neighbours.count; ++o) {
        Vec<T> value = load(s + o * layout.offset);
        if (bias) value += bias[o];
        value = neighbours.masks[o] ? value : minus_infinity;
        store(s + o * layout.offset, value);
        maximum = value > maximum ? value : maximum;
      }
    }
    for (std::int64_t k = 0; k < count; ++k) {
      R* s = score + k * layout.key;
      for (std::int64_t o = 0; o < neighbours.count; ++o) {
        const Vec<T> e = exp_negative(load(s + o * layout.offset) - maximum);
        store(s + o * layout.offset, e);
        sum += e;
      }
    }
    const std::int64_t pixel = this->pixel(i, v);
    for (std::int64_t k = 0; lse && k < clamp(p.x.length - v * lanes<T>, 0, lanes<T>); ++k)
      lse[(pixel + k) * p.heads + this->task.head] =
          maximum[k] + R(sizeof(R) == sizeof(float) ? __builtin_logf(float(sum[k])) : __builtin_log(double(sum[k])));
    return sum;
  }

  Ring<R> queries;
  ScoreLayout layout;
  Buffer<R> scores;  // [max_rows][y.kernel][z.kernel][offsets][lanes]
};

// lse: [batch, depth, height, width, heads] or nullptr
template <class T>
Status forward(const NeighborhoodAttention& p, const Tokens& out, void* lse) {
  const std::int64_t queries = clamp(p.y.length, 0, max_rows), keys = clamp(p.y.kernel + max_rows - 1, 0, p.y.length);
  const NeighborhoodPlan<T> plan(p, 1, queries * p.dim + keys * p.z.kernel * (p.dim + p.value_dim), nullptr);
  if (!plan) return Status::out_of_memory;
  return for_each_band(
      plan, [&] { return QueryRows<T>(plan); },
      [&](QueryRows<T>& rows) {
        for (std::int64_t i = rows.task.begin; i < rows.task.end; i += max_rows)
          rows.attend(i, int(clamp(rows.task.end - i, 0, max_rows)), out, static_cast<Real<T>*>(lse));
      });
}

}  // namespace

Status neighborhood_attention_forward(Type type, const NeighborhoodAttention& p, const Tokens& out, void* lse) {
  if (needs_tiles(p)) return tiled_forward(type, p, out, lse);
  switch (type) {
    case Type::float32: return forward<float>(p, out, lse);
    case Type::float64: return forward<double>(p, out, lse);
    case Type::bfloat16: return forward<bf16>(p, out, lse);
    case Type::float16: return forward<f16>(p, out, lse);
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
