#include "unmask_attention.h"

#include <type_traits>

namespace inr {
namespace INR_ISA {
namespace {

// All keys, which are the values too.
template <class T>
struct Keys {
  explicit Keys(const Plan<T>& plan) : features(operands(plan)), bias(plan.p.batch * plan.blocks * plan.block) {}
  explicit operator bool() const { return features && bias; }
  std::unique_ptr<Operands<T>[]> features;  // [batch][blocks]
  Buffer<Real<T>> bias;                     // [batch][blocks][block], -infinity where there is no token
};

// The rows of one tile, on one thread.
template <class T>
struct Tile {
  using R = Real<T>;

  explicit Tile(const Plan<T>& plan)
      : plan(plan), rows(tile_rows * plan.stride), scores(tile_rows * score_stride()), sums(tile_rows * plan.wide) {
    if (!std::is_same<T, R>::value) rounded.resize(tile_rows * plan.block);
  }
  explicit operator bool() const { return rows && scores && sums && (std::is_same<T, R>::value || rounded); }

  // A vector longer than the block, so that rows fall into different cache sets.
  std::int64_t score_stride() const { return plan.block + lanes<T>; }

  void clear(std::int64_t count) {
    std::memset(static_cast<void*>(sums), 0, std::size_t(tile_rows * plan.wide) * sizeof(R));
    for (int r = 0; r < tile_rows; ++r) most[r] = -std::numeric_limits<R>::infinity(), total[r] = 0;
    for (int r = int(count); r < tile_rows; ++r) factor[r] = 0;
  }

  // scores = factor rows . keys + bias
  void score(const Operands<T>& keys, const R* bias, std::int64_t count) {
    const std::int64_t wide = score_stride();
    Packed<T>::multiply(keys.across, rows, count, plan.stride, [&](std::int64_t r, std::int64_t j, Vec<T> v) {
      store(scores + r * wide + j, v * factor[r] + load(bias + j));
    });
  }

  // Scores -> e^(score - the row's most), and what was summed so far on the same footing.
  void soften(std::int64_t r, std::int64_t keys) {
    R* s = scores + r * score_stride();
    Vec<T> high = load(s);
    for (std::int64_t j = lanes<T>; j < keys; j += lanes<T>) {
      const Vec<T> v = load(s + j);
      high = v > high ? v : high;
    }
    const R highest = reduce(high, [](R a, R b) { return a > b ? a : b; });
    if (highest > most[r]) {
      const Vec<T> shrink = exp_negative(Vec<T>{} + (most[r] - highest));
      most[r] = highest;
      total[r] *= shrink[0];
      R* sum = sums + r * plan.wide;
      for (std::int64_t c = 0; c < plan.wide; c += lanes<T>) store(sum + c, load(sum + c) * shrink);
    }
    Vec<T> added{};
    for (std::int64_t j = 0; j < keys; j += lanes<T>) {
      const Vec<T> e = exp_negative(load(s + j) - most[r]);
      added += e;
      if constexpr (std::is_same<T, R>::value)
        store(s + j, e);
      else
        store(rounded + r * plan.block + j, e);
    }
    total[r] += reduce(added, [](R a, R b) { return a + b; });
  }

  // sums += softened scores . values
  void mix(const Operands<T>& values, std::int64_t count) {
    const T* from;
    std::int64_t from_stride;
    if constexpr (std::is_same<T, R>::value)
      from = scores, from_stride = score_stride();
    else
      from = rounded, from_stride = plan.block;
    Packed<T>::multiply(values.along, from, count, from_stride, [&](std::int64_t r, std::int64_t c, Vec<T> v) {
      store(sums + r * plan.wide + c, load(sums + r * plan.wide + c) + v);
    });
  }

  const Plan<T>& plan;
  Buffer<T> rows, rounded;
  Buffer<R> scores, sums;
  R factor[tile_rows], most[tile_rows], total[tile_rows];
};

template <class T, class In>
Status forward(const UnmaskAttention& p, In* out, Real<T>* softmax) {
  using R = Real<T>;
  const In* feat = static_cast<const In*>(p.feat);
  const Plan<T> plan(p);
  if (!plan) return Status::out_of_memory;
  Keys<T> keys(plan);
  if (!keys) return Status::out_of_memory;

  Status status = for_each<Staging<T>>(plan, p.batch * plan.blocks, [&](Staging<T>& staging, std::int64_t i) {
    const std::int64_t image = i / plan.blocks, begin = i % plan.blocks * plan.block;
    if (begin >= plan.answering[image]) return true;
    const std::int64_t end = plan.block_end(image, begin);
    plan.gather(feat, image, begin, end, staging.rows);
    for (std::int64_t j = 0; j < plan.block; ++j)
      keys.bias[i * plan.block + j] = begin + j < end ? plan.key_bias(image, plan.at(image, begin + j))
                                                         : -std::numeric_limits<R>::infinity();
    return keys.features[i].pack(staging.rows, end - begin, p.channels, plan.stride);
  });
  if (status != Status::ok) return status;

  status = for_each<Tile<T>>(plan, p.batch * plan.tiles, [&](Tile<T>& tile, std::int64_t i) {
    const std::int64_t image = i / plan.tiles, begin = i % plan.tiles * tile_rows, asking = plan.asking[image];
    if (begin >= asking) return true;
    const std::int64_t end = asking < begin + tile_rows ? asking : begin + tile_rows, count = end - begin;
    tile.clear(count);
    plan.gather(feat, image, begin, end, tile.rows);
    for (std::int64_t r = 0; r < count; ++r)
      tile.factor[r] = R(p.scale) * plan.weight(image, plan.at(image, begin + r));
    for (std::int64_t j = 0; j < plan.answering[image]; j += plan.block) {
      const std::int64_t block = image * plan.blocks + j / plan.block;
      const std::int64_t padded = round_up(plan.block_end(image, j) - j, lanes<T>);
      tile.score(keys.features[block], keys.bias + block * plan.block, count);
      for (std::int64_t r = 0; r < count; ++r) tile.soften(r, padded);
      tile.mix(keys.features[block], count);
    }
    for (std::int64_t r = 0; r < count; ++r) {
      R* row = softmax + 2 * image * p.tokens + plan.at(image, begin + r);
      row[0] = tile.most[r], row[p.tokens] = tile.total[r];
    }
    for (std::int64_t c = 0; c < p.channels; ++c)
      for (std::int64_t r = 0; r < count; ++r)
        from_real(tile.sums[r * plan.wide + c] / tile.total[r],
                  out + (image * p.channels + c) * p.tokens + plan.at(image, begin + r));
    return true;
  });
  if (status != Status::ok) return status;

  // A masked token's scores are all zero: the mean, exactly.
  return for_each<Staging<T>>(plan, p.batch * p.channels, [&](Staging<T>&, std::int64_t i) {
    const std::int64_t image = i / p.channels;
    double sum = 0;
    if (plan.asking[image] == p.tokens) return true;
    for (std::int64_t t = 0; t < p.tokens; ++t)
      if (plan.key_weight(image, t) != 0) sum += double(plan.key_weight(image, t)) * double(to_real(feat[i * p.tokens + t]));
    const double mean = plan.answers[image] > 0 ? sum / plan.answers[image] : 0;
    for (std::int64_t r = plan.asking[image]; r < p.tokens; ++r) {
      from_real(R(mean), out + i * p.tokens + plan.at(image, r));
      R* row = softmax + 2 * image * p.tokens + plan.at(image, r);
      row[0] = std::numeric_limits<R>::infinity(), row[p.tokens] = 1;
    }
    return true;
  });
}

}  // namespace

Status unmask_attention_forward(Type type, const UnmaskAttention& p, void* out, void* softmax) {
  switch (type) {
    case Type::float32: return forward<float>(p, static_cast<float*>(out), static_cast<float*>(softmax));
    case Type::float64: return forward<double>(p, static_cast<double*>(out), static_cast<double*>(softmax));
    case Type::bfloat16: return forward<Multiplied>(p, static_cast<bf16*>(out), static_cast<float*>(softmax));
    case Type::float16: return forward<float>(p, static_cast<f16*>(out), static_cast<float*>(softmax));
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
