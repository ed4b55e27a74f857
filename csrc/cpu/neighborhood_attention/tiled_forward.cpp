// For a tile of queries Q, with its keys K and values V: out = softmax(scale Q K') V; of several heads that share V, the
// mean is the product of V and the mean of their weights.
#include "tiles.h"

namespace inr {
namespace INR_ISA {
namespace {

template <class T>
class TileAttention : public TileRows<T> {
 public:
  using R = Real<T>;
  using TileRows<T>::p;
  using TileRows<T>::plan;

  explicit TileAttention(const TilePlan<T>& plan)
      : TileRows<T>(plan), factors(plan.columns), mean(p.mean_heads ? plan.keys * plan.columns : 0) {}
  explicit operator bool() const { return TileRows<T>::operator bool() && factors && mean; }

  // The output of one head, or the mean of all. lse: [batch, height, width, heads] or nullptr
  void attend(std::int64_t head, const Tokens& out, R* lse) {
    this->stage_keys(p.value, head * p.value_heads / p.heads, p.value_dim, this->value);
    if (!p.mean_heads) {
      weigh(head, lse);
      combine(this->weights, out, head);
      return;
    }
    const std::int64_t size = this->keys * this->columns;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      weigh(h, lse);
      for (std::int64_t m = 0; m < this->columns; m += lanes<T>) {
        const Vec<T> factor = load(factors + m) / R(p.heads);
        for (std::int64_t i = m; i < size; i += this->columns)
          store(mean + i, (h ? load(mean + i) : Vec<T>{}) + factor * load(this->weights + i));
      }
    }
    for (std::int64_t m = 0; m < this->columns; ++m) factors[m] = 1;
    combine(mean, out, 0);
  }

 private:
  // Computes the weights of a head before their division by the sum, and its inverse as factors.
  void weigh(std::int64_t head, R* lse) {
    this->stage_keys(p.key, head * p.key_heads / p.heads, p.dim, this->key);
    this->stage_queries(p.query, head, p.dim, R(p.scale), this->query, this->query_columns);
    this->multiply(this->key, p.dim, this->query_columns, this->weights);
    for (std::int64_t m = 0; m < this->columns; m += lanes<T>) softmax(head, m, lse);
  }

  // Replaces the scores of the queries m ... by exp(score - maximum).
  INR_NOINLINE void softmax(std::int64_t head, std::int64_t m, R* lse) {
    const Vec<T> minus_infinity = Vec<T>{} - R(__builtin_inf());
    Vec<T> maximum = minus_infinity, sum{};
    this->for_each_key(m, [&](std::int64_t n, std::int64_t at, Mask<T> mask) {
      Vec<T> score = load(this->weights + at);
      if (p.bias) score += this->bias(head, n, m, mask);
      score = mask ? score : minus_infinity;
      store(this->weights + at, score);
      maximum = score > maximum ? score : maximum;
    });
    for (std::int64_t at = m; at < this->keys * this->columns; at += this->columns) {
      const Vec<T> e = exp_negative(load(this->weights + at) - maximum);
      store(this->weights + at, e);
      sum += e;
    }
    store(factors + m, R(1) / sum);
    for (std::int64_t k = 0; lse && k < clamp(this->queries - m, 0, lanes<T>); ++k)
      lse[this->pixel(m + k) * p.heads + head] =
          maximum[k] + R(sizeof(R) == sizeof(float) ? __builtin_logf(float(sum[k])) : __builtin_log(double(sum[k])));
  }

  // out[m] = factors[m] sum_n from[n][m] value[n]
  INR_NOINLINE void combine(const R* from, const Tokens& out, std::int64_t head) const {
    product<R>(this->queries, plan.value_dim, this->keys, from, 1, this->columns, this->value, plan.value_dim,
               [&](std::int64_t m, std::int64_t d, Vec<T> sum) {
                 if (m < this->queries)
                   store_up_to<T>(sum * factors[m], p.value_dim - d, this->query_of(out, head, m) + d);
               });
  }

  Buffer<R> factors;  // [columns]
  Buffer<R> mean;     // [keys][columns]
};

template <class T>
Status forward(const NeighborhoodAttention& p, const Tokens& out, void* lse) {
  const TilePlan<T> plan(p);
  if (!plan) return Status::out_of_memory;
  // Heads are adjacent in memory, so consecutive tasks are different heads of the same rows.
  const std::int64_t heads = p.mean_heads ? 1 : p.heads;
  return for_each_task(
      plan.threads, p.batch * plan.y.count * heads, [&] { return TileAttention<T>(plan); },
      [&](TileAttention<T>& tile, std::int64_t i) {
        const std::int64_t row = i / heads % plan.y.count, image = i / heads / plan.y.count;
        for (std::int64_t column = 0; column < plan.x.count; ++column) {
          tile.begin(image, plan.y.tiles[row], plan.x.tiles[column]);
          tile.attend(i % heads, out, static_cast<Real<T>*>(lse));
        }
        return Status::ok;
      });
}

}  // namespace

Status tiled_forward(Type type, const NeighborhoodAttention& p, const Tokens& out, void* lse) {
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
