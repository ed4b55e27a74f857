#include "common.h"

#include <type_traits>

namespace inr {
namespace INR_ISA {
namespace {

// All keys, which are also the values.
template <class T>
struct KeyBlocks {
  explicit KeyBlocks(const UnmaskPlan<T>& plan) : features(packed_tokens(plan)) {
    const std::int64_t blocks = plan.p.batch * plan.blocks;
    for (Buffer<Real<T>>* b : {&weight, &bias}) b->resize(blocks * plan.block);
    sums.resize(blocks * plan.p.channels);
  }
  explicit operator bool() const { return features && weight && bias && sums; }
  std::unique_ptr<PackedTokens<T>[]> features;  // [batch][blocks]
  Buffer<Real<T>> weight, bias;  // [batch][blocks][block]; 0 and -infinity after the last token
  Buffer<double> sums;           // [batch][blocks][channels], of the weighted features
};

// The queries of one tile and their running softmax, on one thread.
template <class T>
struct QueryTile {
  using R = Real<T>;

  explicit QueryTile(const UnmaskPlan<T>& plan)
      : plan(plan), staging(plan), scores(tile_rows * score_stride()), sums(tile_rows * plan.wide) {
    if (!std::is_same<T, R>::value) rounded.resize(tile_rows * plan.block);
  }
  explicit operator bool() const { return staging && scores && sums && (std::is_same<T, R>::value || rounded); }

  // One vector longer than the block, so that rows fall into different cache sets.
  std::int64_t score_stride() const { return plan.block + lanes<T>; }

  void clear(std::int64_t count) {
    std::memset(static_cast<void*>(sums), 0, std::size_t(tile_rows * plan.wide) * sizeof(R));
    for (int r = 0; r < tile_rows; ++r) maximum[r] = -std::numeric_limits<R>::infinity(), total[r] = 0;
    for (int r = int(count); r < tile_rows; ++r) factor[r] = 0;
  }

  // scores = factor * rows . keys + bias. rows: [count][stride]; bias: [block]
  void score(const T* rows, const PackedMatrix<T>& keys, const R* bias, std::int64_t count) {
    const std::int64_t wide = score_stride();
    PackedMatrix<T>::multiply(keys, rows, count, plan.stride, [&](std::int64_t r, std::int64_t j, Vec<T> v) {
      store(scores + r * wide + j, v * factor[r] + load(bias + j));
    });
  }

  // Replaces the scores of row r by exp(score - maximum), and rescales the row's sums if the maximum has increased.
  void exponentiate(std::int64_t r, std::int64_t keys) {
    R* s = scores + r * score_stride();
    Vec<T> high = load(s);
    for (std::int64_t j = lanes<T>; j < keys; j += lanes<T>) {
      const Vec<T> v = load(s + j);
      high = v > high ? v : high;
    }
    const R highest = reduce(high, [](R a, R b) { return a > b ? a : b; });
    if (highest > maximum[r]) {
      const Vec<T> shrink = exp_negative(Vec<T>{} + (maximum[r] - highest));
      maximum[r] = highest;
      total[r] *= shrink[0];
      R* sum = sums + r * plan.wide;
      for (std::int64_t c = 0; c < plan.wide; c += lanes<T>) store(sum + c, load(sum + c) * shrink);
    }
    Vec<T> added{};
    for (std::int64_t j = 0; j < keys; j += lanes<T>) {
      const Vec<T> e = exp_negative(load(s + j) - maximum[r]);
      added += e;
      if constexpr (std::is_same<T, R>::value)
        store(s + j, e);
      else
        store(rounded + r * plan.block + j, e);
    }
    total[r] += reduce(added, [](R a, R b) { return a + b; });
  }

  // sums += exp(scores - maximum) . values
  void accumulate(const PackedMatrix<T>& values, std::int64_t count) {
    const T* from;
    std::int64_t from_stride;
    if constexpr (std::is_same<T, R>::value)
      from = scores, from_stride = score_stride();
    else
      from = rounded, from_stride = plan.block;
    PackedMatrix<T>::multiply(values, from, count, from_stride, [&](std::int64_t r, std::int64_t c, Vec<T> v) {
      store(sums + r * plan.wide + c, load(sums + r * plan.wide + c) + v);
    });
  }

  const UnmaskPlan<T>& plan;
  TokenStaging<T> staging;
  Buffer<T> rounded;  // [tile_rows][block]: the exponentials as operands, if T is not R
  Buffer<R> scores;   // [tile_rows][score_stride()]
  Buffer<R> sums;     // [tile_rows][wide]
  R factor[tile_rows], maximum[tile_rows], total[tile_rows];
};

// Packs one block of keys. feat: [batch, channels, tokens]; index: [batch * blocks] of the block
template <class T, class In>
bool pack(const UnmaskPlan<T>& plan, const In* feat, std::int64_t index, TokenStaging<T>& staging, KeyBlocks<T>& keys) {
  using R = Real<T>;
  const std::int64_t image = index / plan.blocks;
  const Span span = plan.span(image, index % plan.blocks);
  if (span.begin >= plan.key_count[image]) return true;
  plan.gather(feat, image, span, staging.planes);
  R *weight = keys.weight + index * plan.block, *bias = keys.bias + index * plan.block;
  for (std::int64_t j = 0; j < plan.block; ++j) {
    const std::int64_t token = j < span.size() ? plan.at(image, span.begin + j) : -1;
    weight[j] = token < 0 ? R(0) : plan.key_weight(image, token);
    bias[j] = token < 0 ? -std::numeric_limits<R>::infinity() : plan.key_bias(image, token);
  }
  plan.add_up(staging.planes, span.size(), weight, keys.sums + index * plan.p.channels);
  return keys.features[index].set(plan, span.size(), staging.planes);
}

// out: [batch, channels, tokens]; softmax: [batch, 2, tokens]
template <class T, class In>
Status forward(const UnmaskAttention& p, In* out, Real<T>* softmax) {
  using R = Real<T>;
  const In* feat = static_cast<const In*>(p.feat);
  const UnmaskPlan<T> plan(p, false);
  if (!plan) return Status::out_of_memory;
  KeyBlocks<T> keys(plan);
  if (!keys) return Status::out_of_memory;

  const auto attend = [&](QueryTile<T>& tile, std::int64_t own, std::int64_t offset) {
    const std::int64_t image = own / plan.blocks;
    const Span span = plan.tile(own, offset);
    const std::int64_t queries = clamp(plan.query_count[image] - span.begin, 0, span.size());
    tile.clear(queries);
    for (std::int64_t r = 0; r < queries; ++r)
      tile.factor[r] = R(p.scale) * plan.weight(image, plan.at(image, span.begin + r));
    for (std::int64_t b = 0; b < plan.blocks && queries > 0; ++b) {
      const Span others = plan.span(image, b);
      if (others.begin >= plan.key_count[image]) break;
      const std::int64_t block = image * plan.blocks + b;
      tile.score(keys.features[own].rows + offset * plan.stride, keys.features[block].channels_by_tokens,
                 keys.bias + block * plan.block, queries);
      for (std::int64_t r = 0; r < queries; ++r) tile.exponentiate(r, round_up(others.size(), lanes<T>));
      tile.accumulate(keys.features[block].tokens_by_channels, queries);
    }
    for (std::int64_t r = 0; r < span.size(); ++r) {
      R* row = softmax + 2 * image * p.tokens + plan.at(image, span.begin + r);
      row[0] = r < queries ? tile.maximum[r] : std::numeric_limits<R>::infinity();
      row[p.tokens] = r < queries ? tile.total[r] : R(1);
      R* sum = tile.sums + r * plan.wide;
      for (std::int64_t c = 0; c < plan.wide && r < queries; c += lanes<T>)
        store(sum + c, load(sum + c) / tile.total[r]);
    }
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const std::int64_t* token = plan.order + image * p.tokens + span.begin;
      In* to = out + (image * p.channels + c) * p.tokens;
      for (std::int64_t r = 0; r < queries; ++r) from_real(tile.sums[r * plan.wide + c], to + token[r]);
      if (queries == span.size()) continue;
      const R mean = plan.mean(keys.sums, image, c);  // a masked token's scores are all zero
      for (std::int64_t r = queries; r < span.size(); ++r) from_real(mean, to + token[r]);
    }
  };
  return for_each_tile<QueryTile<T>>(
      plan, [&](QueryTile<T>& tile, std::int64_t i) { return pack(plan, feat, i, tile.staging, keys); }, attend);
}

}  // namespace

Status unmask_attention_forward(Type type, const UnmaskAttention& p, void* out, void* softmax) {
  switch (type) {
    case Type::float32: return forward<float>(p, static_cast<float*>(out), static_cast<float*>(softmax));
    case Type::float64: return forward<double>(p, static_cast<double*>(out), static_cast<double*>(softmax));
    case Type::bfloat16: return forward<Bf16Operand>(p, static_cast<bf16*>(out), static_cast<float*>(softmax));
    case Type::float16: return forward<float>(p, static_cast<f16*>(out), static_cast<float*>(softmax));
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
