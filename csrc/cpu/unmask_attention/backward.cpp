#include "common.h"

#include <type_traits>

namespace inr {
namespace INR_ISA {
namespace {

// All tokens and the gradients of their outputs, with the terms of p = exp(factor f . f' + bias - maximum) / total.
// Scores are bitwise equal to the forward's: a difference in rounding to `maximum` would be an error of p.
template <class T>
struct TokenBlocks {
  using R = Real<T>;
  explicit TokenBlocks(const UnmaskPlan<T>& plan) : features(packed_tokens(plan)), gradients(packed_tokens(plan)) {
    const std::int64_t n = plan.p.batch * plan.blocks * plan.block;
    for (Buffer<R>* b : {&bias, &factor, &maximum, &inverse, &mean}) b->resize(n);
    masked.resize(plan.p.batch * plan.blocks * plan.p.channels);
  }
  explicit operator bool() const {
    return features && gradients && bias && factor && maximum && inverse && mean && masked;
  }

  std::unique_ptr<PackedTokens<T>[]> features, gradients;  // [batch][blocks]
  // [batch][blocks][block]
  Buffer<R> bias;              // of a token as a key; -infinity after the last token
  Buffer<R> factor;            // weight * scale
  Buffer<R> maximum, inverse;  // +infinity for masked tokens; 1 / total
  Buffer<R> mean;              // sum_j p_ij (g_i . f_j) = g_i . e_i, for gradients g_i and outputs e_i
  Buffer<double> masked;       // [batch][blocks][channels]: sums of the masked tokens' gradients
};

// A block before it is packed into TokenBlocks.
template <class T>
struct BlockStaging {
  explicit BlockStaging(const UnmaskPlan<T>& plan)
      : features(plan), gradients(plan), rest(plan.block), mixed(plan.block) {}
  explicit operator bool() const { return features && gradients && rest && mixed; }
  TokenStaging<T> features, gradients;
  Buffer<Real<T>> rest, mixed;  // [block]
};

// The gradients of one tile's tokens, on one thread. Each pair of a token i of the tile and a token j is visited once,
// for i as the query of key j and for j as the query of key i.
template <class T>
struct PairTile {
  using R = Real<T>;

  explicit PairTile(const UnmaskPlan<T>& plan)
      : plan(plan), block(plan), probabilities(tile_rows * stride()), coefficients(tile_rows * stride()),
        sums(tile_rows * plan.wide) {
    for (Buffer<R>* products : {&scores, &feature_gradient, &gradient_feature}) products->resize(tile_rows * stride());
  }
  explicit operator bool() const {
    return block && probabilities && coefficients && sums && scores && feature_gradient && gradient_feature;
  }
  std::int64_t stride() const { return plan.plane_stride(); }

  // products = rows . tokens. rows: [count][plan.stride]; products: [count][stride()]
  void multiply(const T* rows, const PackedMatrix<T>& tokens, std::int64_t count, R* products) {
    PackedMatrix<T>::multiply(tokens, rows, count, plan.stride, [&](std::int64_t r, std::int64_t j, Vec<T> v) {
      store(products + r * stride() + j, v);
    });
  }
  // sums += rows . tokens. rows: [count][stride()]
  void accumulate(const T* rows, const PackedMatrix<T>& tokens, std::int64_t count) {
    PackedMatrix<T>::multiply(tokens, rows, count, stride(), [&](std::int64_t r, std::int64_t c, Vec<T> v) {
      store(sums + r * plan.wide + c, load(sums + r * plan.wide + c) + v);
    });
  }

  // Adds the contributions of a block's `others` tokens to the gradients of the tile's tokens, which are `count` from
  // `offset` on of own_block.
  void add_pairs(const TokenBlocks<T>& all, std::int64_t own_block, std::int64_t offset, std::int64_t count,
                 bool is_query, std::int64_t block, std::int64_t others, bool others_query) {
    const PackedTokens<T>&f = all.features[block], &g = all.gradients[block];
    const std::int64_t own = own_block * plan.block + offset;
    const T* features = all.features[own_block].rows + offset * plan.stride;
    multiply(features, f.channels_by_tokens, count, scores);
    if (is_query)
      multiply(all.gradients[own_block].rows + offset * plan.stride, f.channels_by_tokens, count, gradient_feature);
    if (others_query) multiply(features, g.channels_by_tokens, count, feature_gradient);
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t j = 0; j < others; j += lanes<T>) {
        const std::int64_t at = r * stride() + j, other = block * plan.block + j;
        const Vec<T> product = load(scores + at);
        Vec<T> coefficient{};
        if (is_query) {
          const Vec<T> score = product * all.factor[own + r] + load(all.bias + other);
          const Vec<T> p = exp_negative(score - all.maximum[own + r]) * all.inverse[own + r];
          coefficient += p * (load(gradient_feature + at) - all.mean[own + r]) * all.factor[own + r];
        }
        if (others_query) {
          const Vec<T> factor = load(all.factor + other), score = product * factor + all.bias[own + r];
          const Vec<T> p = exp_negative(score - load(all.maximum + other)) * load(all.inverse + other);
          store(probabilities + at, p);
          coefficient += p * (load(feature_gradient + at) - load(all.mean + other)) * factor;
        }
        store(coefficients + at, coefficient);
      }
    accumulate(coefficients, f.tokens_by_channels, count);
    if (others_query) accumulate(probabilities, g.tokens_by_channels, count);
  }

  const UnmaskPlan<T>& plan;
  BlockStaging<T> block;
  Buffer<T> probabilities, coefficients;                 // [tile_rows][stride()]
  Buffer<R> sums;                                        // [tile_rows][wide]
  Buffer<R> scores, feature_gradient, gradient_feature;  // [tile_rows][stride()]: f . f', f . g', g . f'
};

// Packs one block of tokens. feat, out, grad_out: [batch, channels, tokens]; softmax: [batch, 2, tokens];
// index: [batch * blocks] of the block
template <class T, class In>
bool pack(const UnmaskPlan<T>& plan, const In* feat, const In* out, const Real<T>* softmax, const In* grad_out,
          std::int64_t index, BlockStaging<T>& block, TokenBlocks<T>& all) {
  using R = Real<T>;
  constexpr R infinity = std::numeric_limits<R>::infinity();
  const UnmaskAttention& p = plan.p;
  const std::int64_t image = index / plan.blocks;
  const Span span = plan.span(image, index % plan.blocks);
  const bool is_query = span.begin < plan.query_count[image];
  plan.gather(grad_out, image, span, block.gradients.planes);
  if (!is_query)
    plan.add_up(block.gradients.planes, span.size(), static_cast<R*>(nullptr), all.masked + index * p.channels);
  if (span.begin >= plan.key_count[image]) return true;
  for (std::int64_t j = 0; j < plan.block; ++j) {
    const std::int64_t to = index * plan.block + j, token = j < span.size() ? plan.at(image, span.begin + j) : -1;
    all.bias[to] = token < 0 ? -infinity : plan.key_bias(image, token);
    all.factor[to] = token < 0 ? R(0) : R(p.scale) * plan.weight(image, token);
    all.maximum[to] = token < 0 ? infinity : softmax[2 * image * p.tokens + token];
    all.inverse[to] = token < 0 ? R(0) : 1 / softmax[(2 * image + 1) * p.tokens + token];
  }
  plan.gather(feat, image, span, block.features.planes);
  if (!all.features[index].set(plan, span.size(), block.features.planes)) return false;
  if (!is_query) return true;
  // g . e = g . f + g . (e - f). If a token attends mostly to mean, this g . f and that of the matrix product, which
  // is summed in the same order, must cancel exactly.
  R *mean = all.mean + index * plan.block, *rest = block.rest, *mixed = block.mixed;
  for (std::int64_t j = 0; j < plan.block; ++j) rest[j] = 0;
  for (std::int64_t c = 0; c < p.channels; ++c) {
    const In* plane = out + (image * p.channels + c) * p.tokens;
    for (std::int64_t j = 0; j < span.size(); ++j) mixed[j] = to_real(plane[plan.at(image, span.begin + j)]);
    for (std::int64_t j = 0; j < span.size(); j += lanes<T>) {
      const std::int64_t at = c * plan.plane_stride() + j;
      const Vec<T> f = load(block.features.planes + at), g = load(block.gradients.planes + at);
      store(mean + j, load(mean + j) + g * f);
      store(rest + j, load(rest + j) + g * (load(mixed + j) - f));
    }
  }
  for (std::int64_t j = 0; j < span.size(); ++j) mean[j] += rest[j];  // `mixed` is undefined after the last token
  return all.gradients[index].set(plan, span.size(), block.gradients.planes);
}

// out, grad_out, grad_feat: [batch, channels, tokens]; softmax: [batch, 2, tokens]
template <class T, class In>
Status backward(const UnmaskAttention& p, const In* out, const Real<T>* softmax, const In* grad_out, In* grad_feat) {
  const In* feat = static_cast<const In*>(p.feat);
  const UnmaskPlan<T> plan(p, true);
  if (!plan) return Status::out_of_memory;
  TokenBlocks<T> all(plan);
  if (!all) return Status::out_of_memory;

  const auto backward_tile = [&](PairTile<T>& tile, std::int64_t own, std::int64_t offset) {
    const std::int64_t image = own / plan.blocks, queries = plan.query_count[image], key_count = plan.key_count[image];
    const Span span = plan.tile(own, offset);
    std::memset(static_cast<void*>(tile.sums), 0, std::size_t(tile_rows * plan.wide) * sizeof(Real<T>));
    // Masked tokens that are not keys have no pairs.
    for (std::int64_t b = 0; b < plan.blocks && span.begin < key_count; ++b) {
      const Span others = plan.span(image, b);
      const bool is_query = span.begin < queries, others_query = others.begin < queries;
      if (others.begin >= key_count || !(is_query || others_query)) break;
      tile.add_pairs(all, own, offset, span.size(), is_query, image * plan.blocks + b,
                     round_up(others.size(), lanes<T>), others_query);
    }
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const Real<T> masked_mean = plan.mean(all.masked, image, c);
      for (std::int64_t r = 0; r < span.size(); ++r) {
        const std::int64_t token = plan.at(image, span.begin + r);
        from_real(tile.sums[r * plan.wide + c] + masked_mean * plan.key_weight(image, token),
                  grad_feat + (image * p.channels + c) * p.tokens + token);
      }
    }
  };
  return for_each_tile<PairTile<T>>(
      plan,
      [&](PairTile<T>& tile, std::int64_t i) { return pack(plan, feat, out, softmax, grad_out, i, tile.block, all); },
      backward_tile);
}

}  // namespace

Status unmask_attention_backward(Type type, const UnmaskAttention& p, const void* out, const void* softmax,
                                 const void* grad_out, void* grad_feat) {
  const auto run = [&](auto* in, auto* product) {
    using In = typename std::remove_pointer<decltype(in)>::type;
    using T = typename std::remove_pointer<decltype(product)>::type;
    return backward<T>(p, static_cast<const In*>(out), static_cast<const Real<T>*>(softmax),
                       static_cast<const In*>(grad_out), static_cast<In*>(grad_feat));
  };
  float* single = nullptr;
  switch (type) {
    case Type::float32: return run(single, single);
    case Type::float64: return run(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case Type::bfloat16: return run(static_cast<bf16*>(nullptr), static_cast<Bf16Operand*>(nullptr));
    case Type::float16: return run(static_cast<f16*>(nullptr), single);
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
