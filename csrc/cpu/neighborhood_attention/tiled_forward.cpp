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
      : TileRows<T>(plan), heads(plan.p.mean_heads ? plan.p.heads : 1), staged_columns(columns_to_stage(plan)),
        key_pitch(staged_columns * plan.dim), value_pitch(staged_columns * plan.value_dim),
        staged_keys(heads * plan.y.max_keys() * key_pitch), staged_values(plan.y.max_keys() * value_pitch),
        factors(plan.columns), mean(p.mean_heads ? plan.keys * plan.columns : 0) {}
  explicit operator bool() const {
    return TileRows<T>::operator bool() && staged_keys && staged_values && factors && mean;
  }

  // Computes a row of tiles: the output of one head, or the mean of all. lse: [batch, height, width, heads] or nullptr
  void attend(std::int64_t image, const Side& row, std::int64_t head, const Tokens& out, R* lse) {
    staged = {0, 0};
    for (std::int64_t i = 0; i < plan.x.count; ++i) {
      this->begin(image, row, plan.x.tiles[i]);
      stage(head);
      attend_tile(head, out, lse);
    }
  }

 private:
  // Columns of keys that are staged at once, for several tiles: those of a tile, or as many as fit the L2 cache.
  static std::int64_t columns_to_stage(const TilePlan<T>& plan) {
    const std::int64_t channels = (plan.p.mean_heads ? plan.p.heads : 1) * plan.dim + plan.value_dim;
    const std::int64_t most = (256 << 10) / (plan.y.max_keys() * channels * std::int64_t(sizeof(R)));
    return clamp(most, plan.x.max_keys(), class_size(plan.p.x, 0));
  }

  // Stages the keys and values of the tile, and of columns after it, unless they are.
  void stage(std::int64_t head) {
    if (this->x.residue == residue && this->x.keys.begin >= staged.begin && this->x.keys.end <= staged.end) return;
    residue = this->x.residue;
    staged.begin = this->x.keys.begin;
    staged.end = clamp(staged.begin + staged_columns, 0, class_size(p.x, residue));
    for (std::int64_t h = 0; h < heads; ++h)
      this->stage_keys(p.key, (head + h) * p.key_heads / p.heads, p.dim, staged, keys_of(h), key_pitch);
    this->stage_keys(p.value, head * p.value_heads / p.heads, p.value_dim, staged, staged_values, value_pitch);
  }
  R* keys_of(std::int64_t h) const { return staged_keys + h * plan.y.max_keys() * key_pitch; }

  void attend_tile(std::int64_t head, const Tokens& out, R* lse) {
    if (!p.mean_heads) {
      weigh(head, 0, lse);
      combine(this->weights, out, head);
      return;
    }
    const std::int64_t size = this->keys * this->columns;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      weigh(h, h, lse);
      for (std::int64_t m = 0; m < this->columns; m += lanes<T>) {
        const Vec<T> factor = load(factors + m) / R(p.heads);
        for (std::int64_t i = m; i < size; i += this->columns)
          store(mean + i, (h ? load(mean + i) : Vec<T>{}) + factor * load(this->weights + i));
      }
    }
    for (std::int64_t m = 0; m < this->columns; ++m) factors[m] = 1;
    combine(mean, out, 0);
  }

  // Computes the weights of a head before their division by the sum, and its inverse as factors. h: of the staged ones
  void weigh(std::int64_t head, std::int64_t h, R* lse) {
    this->stage_queries(p.query, head, p.dim, R(p.scale), this->query_columns);
    const R* from = keys_of(h) + (this->x.keys.begin - staged.begin) * plan.dim;
    this->multiply(from, key_pitch, p.dim, this->query_columns, this->weights);
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
  void combine(const R* from, const Tokens& out, std::int64_t head) const {
    const R* rows = staged_values + (this->x.keys.begin - staged.begin) * plan.value_dim;
    TileRows<T>::combine(from, rows, value_pitch, p.value_dim,
                         [&](std::int64_t m, std::int64_t d, const R* sums, std::int64_t n) {
                           this->write_channels(sums, n, factors[m], this->query_of(out, head, m), d, p.value_dim);
                         });
  }

  std::int64_t heads;                    // whose keys are staged
  std::int64_t staged_columns;           // of keys, at most
  std::int64_t key_pitch, value_pitch;   // elements of a staged row
  std::int64_t residue = 0;              // of the staged columns
  Window staged{0, 0};                   // their positions
  Buffer<R> staged_keys, staged_values;  // [heads][rows][columns][dim], [rows][columns][value_dim]
  Buffer<R> factors;                     // [columns]
  Buffer<R> mean;                        // [keys][columns]
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
        tile.attend(image, plan.y.tiles[row], i % heads, out, static_cast<Real<T>*>(lse));
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
