#include "unmask_attention.h"

#include <type_traits>

namespace inr {
namespace INR_ISA {
namespace {

// All tokens and their gradients, with what a row of the softmax needs: p = e^(factor f . f' + bias - most) / total.
// The score is computed as in the forward, to the bit: its rounding, next to `most`, would be an error of p.
template <class T>
struct Tokens {
  using R = Real<T>;
  explicit Tokens(const Plan<T>& plan) : features(operands(plan)), gradients(operands(plan)) {
    const std::int64_t n = plan.p.batch * plan.blocks * plan.block;
    for (Buffer<R>* b : {&bias, &factor, &most, &inverse, &mean}) b->resize(n);
    masked.resize(plan.p.batch * plan.p.channels);
  }
  explicit operator bool() const { return features && gradients && bias && factor && most && inverse && mean && masked; }

  std::unique_ptr<Operands<T>[]> features, gradients;  // [batch][blocks]
  // [batch][blocks][block]
  Buffer<R> bias;           // of a token as a key; -infinity where there is none
  Buffer<R> factor;         // weight * scale
  Buffer<R> most, inverse;  // +infinity where a token does not ask; 1 / total
  Buffer<R> mean;           // sum_j p_ij (g_i . f_j) = g_i . e_i
  Buffer<double> masked;    // [batch][channels] the gradient of what a masked token hands to every key
};

// The tokens of one tile against blocks of tokens, on one thread. A pair (i, j) of them meets once: i asks j, j asks i.
template <class T>
struct Tile {
  using R = Real<T>;

  explicit Tile(const Plan<T>& plan)
      : plan(plan), features(tile_rows * plan.stride), gradients(tile_rows * plan.stride),
        probabilities(tile_rows * stride()), coefficients(tile_rows * stride()), sums(tile_rows * plan.wide) {
    for (Buffer<R>* products : {&scores, &asked, &asking}) products->resize(tile_rows * stride());
  }
  explicit operator bool() const {
    return features && gradients && probabilities && coefficients && sums && scores && asked && asking;
  }

  // A vector longer than the block, so that rows fall into different cache sets.
  std::int64_t stride() const { return plan.block + vector_bytes / std::int64_t(sizeof(T)); }

  void multiply(const T* rows, const Operands<T>& tokens, std::int64_t count, R* products) {
    Packed<T>::multiply(tokens.across, rows, count, plan.stride, [&](std::int64_t r, std::int64_t j, Vec<T> v) {
      store(products + r * stride() + j, v);
    });
  }
  void mix(const T* rows, const Operands<T>& tokens, std::int64_t count) {
    Packed<T>::multiply(tokens.along, rows, count, stride(), [&](std::int64_t r, std::int64_t c, Vec<T> v) {
      store(sums + r * plan.wide + c, load(sums + r * plan.wide + c) + v);
    });
  }

  // Adds what the pairs of tile and block mean for the tile's tokens. own: where the tile stands in `all`.
  void meet(const Tokens<T>& all, std::int64_t own, std::int64_t count, bool asks, std::int64_t block,
            std::int64_t others, bool asked_by) {
    const Operands<T>&f = all.features[block], &g = all.gradients[block];
    multiply(features, f, count, scores);
    if (asks) multiply(gradients, f, count, asking);
    if (asked_by) multiply(features, g, count, asked);
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t j = 0; j < others; j += lanes<T>) {
        const std::int64_t at = r * stride() + j, other = block * plan.block + j;
        const Vec<T> product = load(scores + at);
        Vec<T> coefficient{};
        if (asks) {
          const Vec<T> score = product * all.factor[own + r] + load(all.bias + other);
          const Vec<T> p = exp_negative(score - all.most[own + r]) * all.inverse[own + r];
          coefficient += p * (load(asking + at) - all.mean[own + r]) * all.factor[own + r];
        }
        if (asked_by) {
          const Vec<T> factor = load(all.factor + other), score = product * factor + all.bias[own + r];
          const Vec<T> p = exp_negative(score - load(all.most + other)) * load(all.inverse + other);
          store(probabilities + at, p);
          coefficient += p * (load(asked + at) - load(all.mean + other)) * factor;
        }
        store(coefficients + at, coefficient);
      }
    mix(coefficients, f, count);
    if (asked_by) mix(probabilities, g, count);
  }

  const Plan<T>& plan;
  Buffer<T> features, gradients, probabilities, coefficients;
  Buffer<R> sums;                   // [tile_rows][wide]
  Buffer<R> scores, asked, asking;  // f . f', f . g', g . f'
};

template <class T, class In>
bool pack(const Plan<T>& plan, const In* feat, const In* out, const Real<T>* softmax, const In* grad_out,
          std::int64_t index, Staging<T>& staging, Tokens<T>& all) {
  using R = Real<T>;
  constexpr R infinity = std::numeric_limits<R>::infinity();
  const UnmaskAttention& p = plan.p;
  const std::int64_t image = index / plan.blocks, begin = index % plan.blocks * plan.block;
  if (begin >= plan.answering[image]) return true;
  const std::int64_t end = plan.block_end(image, begin);
  for (std::int64_t j = 0; j < plan.block; ++j) {
    const std::int64_t to = index * plan.block + j, token = begin + j < end ? plan.at(image, begin + j) : -1;
    all.bias[to] = token < 0 ? -infinity : plan.key_bias(image, token);
    all.factor[to] = token < 0 ? R(0) : R(p.scale) * plan.weight(image, token);
    all.most[to] = token < 0 ? infinity : softmax[2 * image * p.tokens + token];
    all.inverse[to] = token < 0 ? R(0) : 1 / softmax[(2 * image + 1) * p.tokens + token];
  }
  for (std::int64_t j = 0; j < end - begin; ++j) {
    // g . e = g . f + g . (e - f). Where a token attends to itself above all, its g . f meets the one of the matrix
    // product, summed in this very order, and they are to cancel to the last bit.
    R itself = 0, rest = 0;
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const std::int64_t from = (image * p.channels + c) * p.tokens + plan.at(image, begin + j);
      const R g = to_real(grad_out[from]), f = to_real(feat[from]);
      itself += g * f;
      rest += g * (to_real(out[from]) - f);
    }
    all.mean[index * plan.block + j] = itself + rest;
  }
  plan.gather(feat, image, begin, end, staging.rows);
  plan.gather(grad_out, image, begin, end, staging.more);
  return all.features[index].pack(staging.rows, end - begin, p.channels, plan.stride) &&
         all.gradients[index].pack(staging.more, end - begin, p.channels, plan.stride);
}

template <class T, class In>
Status backward(const UnmaskAttention& p, const In* out, const Real<T>* softmax, const In* grad_out, In* grad_feat) {
  const In* feat = static_cast<const In*>(p.feat);
  const Plan<T> plan(p);
  if (!plan) return Status::out_of_memory;
  Tokens<T> all(plan);
  if (!all) return Status::out_of_memory;

  Status status = for_each<Staging<T>>(plan, p.batch * plan.blocks, [&](Staging<T>& staging, std::int64_t i) {
    return pack(plan, feat, out, softmax, grad_out, i, staging, all);
  });
  if (status != Status::ok) return status;

  for (std::int64_t i = 0; i < p.batch * p.channels; ++i) {
    const std::int64_t image = i / p.channels;
    double sum = 0;
    for (std::int64_t r = plan.asking[image]; r < p.tokens; ++r)
      sum += double(to_real(grad_out[i * p.tokens + plan.at(image, r)]));
    all.masked[i] = plan.answers[image] > 0 ? sum / plan.answers[image] : 0;
  }

  return for_each<Tile<T>>(plan, p.batch * plan.tiles, [&](Tile<T>& tile, std::int64_t i) {
    const std::int64_t image = i / plan.tiles, begin = i % plan.tiles * tile_rows;
    const std::int64_t end = p.tokens < begin + tile_rows ? p.tokens : begin + tile_rows;
    const std::int64_t asking = plan.asking[image], answering = plan.answering[image];
    const std::int64_t own = image * plan.blocks * plan.block + begin;
    const std::int64_t count = (answering < end ? answering : end) - begin;  // the others meet nobody
    std::memset(static_cast<void*>(tile.sums), 0, std::size_t(tile_rows * plan.wide) * sizeof(Real<T>));
    if (count > 0) {
      plan.gather(feat, image, begin, begin + count, tile.features);
      plan.gather(grad_out, image, begin, begin + count, tile.gradients);
      for (std::int64_t j = 0; j < answering; j += plan.block)
        if (begin < asking || j < asking)
          tile.meet(all, own, count, begin < asking, image * plan.blocks + j / plan.block,
                    round_up(plan.block_end(image, j) - j, lanes<T>), j < asking);
    }
    for (std::int64_t c = 0; c < p.channels; ++c)
      for (std::int64_t r = 0; r < end - begin; ++r) {
        const std::int64_t token = plan.at(image, begin + r), channel = image * p.channels + c;
        const double handed = all.masked[channel] * double(plan.key_weight(image, token));
        const Real<T> sum = r < count ? tile.sums[r * plan.wide + c] : 0;
        from_real(sum + Real<T>(handed), grad_feat + channel * p.tokens + token);
      }
    return true;
  });
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
    case Type::bfloat16: return run(static_cast<bf16*>(nullptr), static_cast<Multiplied*>(nullptr));
    case Type::float16: return run(static_cast<f16*>(nullptr), single);
  }
  return Status::unsupported_type;
}

}  // namespace INR_ISA
}  // namespace inr
