// For the weights P of a tile's queries Q and keys K, and the gradient G of its outputs:
//
//   P' = G V',  S' = P (P' - sum P P' + grad_lse),  Q' = scale S' K,  K' += scale S'^T Q,  V' += P^T G
//
// A task owns a band of rows of keys of one residue class, of the heads that share keys or values. It visits every tile
// whose windows reach into its band, in order, and adds to the gradients of its keys, in full precision; the gradients
// of a tile's queries are written by the task that owns the first query's position. Tiles at the border of two bands
// are therefore computed twice, no thread waits for another one, and the sums do not depend on the bands.
#include <numeric>

#include "tiles.h"

namespace inr {
namespace INR_ISA {
namespace {

// The division of the keys' rows into tasks.
template <class T>
struct BandPlan : TilePlan<T> {
  using TilePlan<T>::p;

  explicit BandPlan(const NeighborhoodAttention& problem)
      : TilePlan<T>(problem), heads(p.heads / (p.mean_heads ? 1 : std::gcd(p.key_heads, p.value_heads))) {
    const std::int64_t units = p.batch * (p.heads / heads) * p.y.dilation, longest = class_size(p.y, 0);
    const std::int64_t wanted = this->threads > 1 ? (4 * this->threads + units - 1) / units : 1;
    rows = (longest + wanted - 1) / wanted;
    bands = (longest + rows - 1) / rows;
  }
  std::int64_t tasks() const { return p.batch * p.y.dilation * bands * (p.heads / heads); }

  std::int64_t heads;        // of a task, adjacent
  std::int64_t rows, bands;  // positions of a task, tasks of a residue class
};

template <class T>
class TileGradients : public TileRows<T> {
 public:
  using R = Real<T>;
  using TileRows<T>::p;

  explicit TileGradients(const BandPlan<T>& plan)
      : TileRows<T>(plan), bands(plan), query(plan.columns * plan.dim), key(plan.keys * plan.dim),
        value(plan.keys * plan.value_dim),
        grad(plan.columns * plan.value_dim), grad_columns(plan.value_dim * plan.columns),
        products(plan.keys * plan.columns), mean(p.mean_heads ? plan.keys * plan.columns : 0),
        key_heads(plan.heads * p.key_heads / p.heads), value_heads(plan.heads * p.value_heads / p.heads),
        key_sums(plan.rows * p.x.length * key_heads * plan.dim),
        value_sums(plan.rows * p.x.length * value_heads * plan.value_dim) {}
  explicit operator bool() const {
    return TileRows<T>::operator bool() && query && key && value && grad && grad_columns && products && mean &&
           key_sums && value_sums;
  }

  // lse, grad_lse: [batch, height, width, heads]; bias_rows: [batch, tiles of y, heads, 2 y.kernel - 1, 2 x.kernel - 1]
  void run(std::int64_t task, const R* lse, const Tokens& grad_out, const R* grad_lse,
           const NeighborhoodAttentionGradients& to, R* bias_rows) {
    const std::int64_t groups = p.heads / bands.heads, band = task / groups, residue = band / bands.bands % p.y.dilation;
    const std::int64_t image = band / bands.bands / p.y.dilation, n = class_size(p.y, residue);
    first_head = task % groups * bands.heads;
    begin = clamp(band % bands.bands * bands.rows, 0, n);
    end = clamp(begin + bands.rows, 0, n);
    std::memset(static_cast<void*>(key_sums), 0, std::size_t(bands.rows * p.x.length * key_heads * bands.dim) * sizeof(R));
    std::memset(static_cast<void*>(value_sums), 0,
                std::size_t(bands.rows * p.x.length * value_heads * bands.value_dim) * sizeof(R));
    for (std::int64_t i = 0; i < bands.y.count && begin < end; ++i) {
      const Side& side = bands.y.tiles[i];
      const std::int64_t position = bands.y.position(side.first);
      const bool owned = position >= begin && position < end;
      const bool reached = (to.key.data || to.value.data) && side.keys.begin < end && side.keys.end > begin;
      if (side.residue != residue || !(owned || reached)) continue;
      const std::int64_t bias_size = p.heads * (2 * p.y.kernel - 1) * (2 * p.x.kernel - 1);
      R* bias_sums = bias_rows && owned ? bias_rows + (image * bands.y.count + i) * bias_size : nullptr;
      for (std::int64_t j = 0; j < bands.x.count; ++j) {
        TileRows<T>::begin(image, side, bands.x.tiles[j]);
        add_tile(lse, grad_out, grad_lse, to, owned, bias_sums);
      }
    }
    if (to.key.data) write(key_sums, key_heads, p.dim, image, residue, to.key, first_head * p.key_heads / p.heads);
    if (to.value.data)
      write(value_sums, value_heads, p.value_dim, image, residue, to.value, first_head * p.value_heads / p.heads);
  }

 private:
  // Adds the gradients of a tile's keys and, if it is owned, writes those of its queries.
  void add_tile(const R* lse, const Tokens& grad_out, const R* grad_lse, const NeighborhoodAttentionGradients& to,
                bool owned, R* bias_sums) {
    const std::int64_t size = this->keys * this->columns;
    const std::int64_t key_pitch = this->across * bands.dim, value_pitch = this->across * bands.value_dim;
    for (std::int64_t h = first_head; h < first_head + bands.heads; ++h) {
      if (h == first_head || !p.mean_heads) {
        this->stage_keys(p.value, h * p.value_heads / p.heads, p.value_dim, this->x.keys, value, value_pitch);
        this->stage_queries(grad_out, p.mean_heads ? 0 : h, p.value_dim, R(1) / R(p.mean_heads ? p.heads : 1),
                            grad_columns, grad);
        this->multiply(value, value_pitch, p.value_dim, grad_columns, products);
      }
      this->stage_keys(p.key, h * p.key_heads / p.heads, p.dim, this->x.keys, key, key_pitch);
      this->stage_queries(p.query, h, p.dim, R(p.scale), this->query_columns, query);
      this->multiply(key, key_pitch, p.dim, this->query_columns, this->weights);
      for (std::int64_t m = 0; m < this->columns; m += lanes<T>) weigh(h, m, lse);
      if (to.value.data && !p.mean_heads)
        add(this->weights, grad, p.value_dim, value_sums, value_heads, (h - first_head) * p.value_heads / p.heads);
      for (std::int64_t i = 0; to.value.data && p.mean_heads && i < size; i += lanes<T>)
        store(mean + i, (h ? load(mean + i) : Vec<T>{}) + load(this->weights + i));
      if (!(to.key.data || to.query.data || bias_sums)) continue;
      for (std::int64_t m = 0; m < this->columns; m += lanes<T>) differentiate(h, m, grad_lse);
      if (to.key.data)
        add(this->weights, query, p.dim, key_sums, key_heads, (h - first_head) * p.key_heads / p.heads);
      if (to.query.data && owned) write_queries(to.query, h);
      if (bias_sums) add_bias(h, bias_sums);
    }
    if (to.value.data && p.mean_heads) add(mean, grad, p.value_dim, value_sums, value_heads, 0);
  }

  // Replaces the scores of the queries m ... by their weights, zero outside the windows.
  INR_NOINLINE void weigh(std::int64_t head, std::int64_t m, const R* lse) {
    Vec<T> total = Vec<T>{} + R(1e30);  // of lanes without a query: weights of zero
    for (std::int64_t k = 0; k < clamp(this->queries - m, 0, lanes<T>); ++k)
      total[k] = lse[this->pixel(m + k) * p.heads + head];
    this->for_each_key(m, [&](std::int64_t n, std::int64_t at, Mask<T> mask) {
      Vec<T> score = load(this->weights + at);
      if (p.bias) score += this->bias(head, n, m, mask);
      store(this->weights + at, (Vec<T>)((Mask<T>)exp_negative(score - total) & mask));
    });
  }

  // Replaces the weights of the queries m ... by the gradients of the scores.
  INR_NOINLINE void differentiate(std::int64_t head, std::int64_t m, const R* grad_lse) {
    Vec<T> sum{};
    for (std::int64_t k = 0; grad_lse && k < clamp(this->queries - m, 0, lanes<T>); ++k)
      sum[k] = -grad_lse[this->pixel(m + k) * p.heads + head];
    const std::int64_t size = this->keys * this->columns;
    for (std::int64_t at = m; at < size; at += this->columns) sum += load(this->weights + at) * load(products + at);
    for (std::int64_t at = m; at < size; at += this->columns)
      store(this->weights + at, load(this->weights + at) * (load(products + at) - sum));
  }

  // sums[key n] += sum_m factors[n][m] rows[m], for the keys of the band. rows: [queries][round_up(dim)]
  INR_NOINLINE void add(const R* factors, const R* rows, std::int64_t dim, R* sums, std::int64_t heads,
                        std::int64_t head) const {
    const std::int64_t size = round_up(dim, lanes<T>);
    product<R>(this->keys, size, this->queries, factors, this->columns, 1, rows, size,
               [&](std::int64_t n, std::int64_t d, Vec<T> sum) {
                 const std::int64_t t = this->y.keys.begin + n / this->across;
                 if (n >= this->keys || t < begin || t >= end) return;
                 const std::int64_t x = this->plan.x.key_at(this->x.residue, this->x.keys.begin + n % this->across);
                 R* to = sums + (((t - begin) * p.x.length + x) * heads + head) * size + d;
                 store(to, load(to) + sum);
               });
  }

  // The gradients of the queries of one head.
  INR_NOINLINE void write_queries(const Tokens& to, std::int64_t head) const {
    this->combine(this->weights, key, this->across * bands.dim, p.dim,
                  [&](std::int64_t m, std::int64_t d, const R* sums, std::int64_t n) {
                    this->write_channels(sums, n, R(p.scale), this->query_of(to, head, m), d, p.dim);
                  });
  }

  // sums: [heads, 2 y.kernel - 1, 2 x.kernel - 1]
  INR_NOINLINE void add_bias(std::int64_t head, R* sums) const {
    for (std::int64_t m = 0; m < this->columns; m += lanes<T>)
      this->for_each_key(m, [&](std::int64_t n, std::int64_t at, Mask<T> mask) {
        for (int k = 0; k < lanes<T>; ++k)
          if (mask[k] && m + k < this->queries) sums[this->bias_at(head, n, m + k)] += this->weights[at + k];
      });
  }

  // Writes the sums of the band's keys. sums: [rows][columns][heads][round_up(dim)]
  void write(const R* sums, std::int64_t heads, std::int64_t dim, std::int64_t image, std::int64_t residue,
             const Tokens& to, std::int64_t first) const {
    const std::int64_t* s = to.strides;
    const std::int64_t size = round_up(dim, lanes<T>);
    for (std::int64_t i = 0; i < (end - begin) * p.x.length * heads; ++i) {
      const std::int64_t y = residue + (begin + i / heads / p.x.length) * p.y.dilation, x = i / heads % p.x.length;
      T* at = static_cast<T*>(const_cast<void*>(to.data)) + image * s[0] + y * s[2] + x * s[3] +
              (first + i % heads) * s[4];
      for (std::int64_t d = 0; d < dim; d += lanes<T>) store_up_to<T>(load(sums + i * size + d), dim - d, at + d);
    }
  }

  const BandPlan<T>& bands;
  Buffer<R> query, key, value;   // staged: [columns][dim], [keys][dim]
  Buffer<R> grad, grad_columns;  // staged: [columns][dim], [dim][columns]
  Buffer<R> products, mean;      // [keys][columns]: P', the sum of all heads' P
  std::int64_t key_heads, value_heads;    // of a task
  Buffer<R> key_sums, value_sums;         // [rows][columns of the map][heads][dim]
  std::int64_t first_head = 0, begin = 0, end = 0;  // of the task; positions of its keys in the class of rows
};

template <class T>
Status backward(const NeighborhoodAttention& p, const void* lse, const Tokens& grad_out, const void* grad_lse,
                const NeighborhoodAttentionGradients& to) {
  using R = Real<T>;
  const BandPlan<T> plan(p);
  if (!plan) return Status::out_of_memory;
  const std::int64_t bias_size = p.heads * (2 * p.y.kernel - 1) * (2 * p.x.kernel - 1), lines = p.batch * plan.y.count;
  Buffer<R> bias_rows;
  if (to.bias && !bias_rows.resize(lines * bias_size)) return Status::out_of_memory;
  const Status status = for_each_task(
      plan.threads, plan.tasks(), [&] { return TileGradients<T>(plan); },
      [&](TileGradients<T>& tile, std::int64_t i) {
        tile.run(i, static_cast<const R*>(lse), grad_out, static_cast<const R*>(grad_lse), to, bias_rows);
        return Status::ok;
      });
  if (status != Status::ok || !to.bias) return status;
  R* bias = static_cast<R*>(to.bias);
  std::memset(bias, 0, std::size_t(bias_size) * sizeof(R));
  for (std::int64_t i = 0; i < lines * bias_size; ++i) bias[i % bias_size] += bias_rows[i];
  return status;
}

}  // namespace

Status tiled_backward(Type type, const NeighborhoodAttention& p, const void* lse, const Tokens& grad_out,
                      const void* grad_lse, const NeighborhoodAttentionGradients& to) {
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
