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
    masked.resize(plan.p.batch * plan.blocks * plan.p.channels);
  }
  explicit operator bool() const { return features && gradients && bias && factor && most && inverse && mean && masked; }

  std::unique_ptr<Operands<T>[]> features, gradients;  // [batch][blocks]
  // [batch][blocks][block]
  Buffer<R> bias;           // of a token as a key; -infinity where there is none
  Buffer<R> factor;         // weight * scale
  Buffer<R> most, inverse;  // +infinity where a token does not ask; 1 / total
  Buffer<R> mean;           // sum_j p_ij (g_i . f_j) = g_i . e_i
  Buffer<double> masked;    // [batch][blocks][channels] sums of the gradients of the tokens that do not ask
};

// A block on its way into Tokens.
template <class T>
struct Block {
  explicit Block(const Plan<T>& plan) : features(plan), gradients(plan), rest(plan.block), mixed(plan.block) {}
  explicit operator bool() const { return features && gradients && rest && mixed; }
  Staging<T> features, gradients;
  Buffer<Real<T>> rest, mixed;
};

// The tokens of one tile against blocks of tokens, on one thread. A pair (i, j) of them meets once: i asks j, j asks i.
template <class T>
struct Tile {
  using R = Real<T>;

  explicit Tile(const Plan<T>& plan)
      : plan(plan), block(plan), probabilities(tile_rows * stride()), coefficients(tile_rows * stride()),
        sums(tile_rows * plan.wide) {
    for (Buffer<R>* products : {&scores, &asked, &asking}) products->resize(tile_rows * stride());
  }
  explicit operator bool() const {
    return block && probabilities && coefficients && sums && scores && asked && asking;
  }
  std::int64_t stride() const { return plan.plane_stride(); }

  void multiply(const T* rows, const Packed<T>& tokens, std::int64_t count, R* products) {
    Packed<T>::multiply(tokens, rows, count, plan.stride, [&](std::int64_t r, std::int64_t j, Vec<T> v) {
      store(products + r * stride() + j, v);
    });
  }
  void mix(const T* rows, const Packed<T>& tokens, std::int64_t count) {
    Packed<T>::multiply(tokens, rows, count, stride(), [&](std::int64_t r, std::int64_t c, Vec<T> v) {
      store(sums + r * plan.wide + c, load(sums + r * plan.wide + c) + v);
    });
  }

  // Adds what the pairs of a tile and a block mean for the tile's tokens, `count` from `offset` on of their own block.
  void meet(const Tokens<T>& all, std::int64_t own_block, std::int64_t offset, std::int64_t count, bool asks,
            std::int64_t block, std::int64_t others, bool asked_by) {
    const Operands<T>&f = all.features[block], &g = all.gradients[block];
    const std::int64_t own = own_block * plan.block + offset;
    const T* features = all.features[own_block].rows + offset * plan.stride;
    multiply(features, f.across, count, scores);
    if (asks) multiply(all.gradients[own_block].rows + offset * plan.stride, f.across, count, asking);
    if (asked_by) multiply(features, g.across, count, asked);
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
    mix(coefficients, f.along, count);
    if (asked_by) mix(probabilities, g.along, count);
  }

  const Plan<T>& plan;
  Block<T> block;
  Buffer<T> probabilities, coefficients;
  Buffer<R> sums;                   // [tile_rows][wide]
  Buffer<R> scores, asked, asking;  // f . f', f . g', g . f'
};

template <class T, class In>
bool pack(const Plan<T>& plan, const In* feat, const In* out, const Real<T>* softmax, const In* grad_out,
          std::int64_t index, Block<T>& block, Tokens<T>& all) {
  using R = Real<T>;
  constexpr R infinity = std::numeric_limits<R>::infinity();
  const UnmaskAttention& p = plan.p;
  const std::int64_t image = index / plan.blocks;
  const Span span = plan.span(image, index % plan.blocks);
  const bool asks = span.begin < plan.asking[image];
  plan.gather(grad_out, image, span, block.gradients.planes);
  if (!asks) plan.add_up(block.gradients.planes, span.size(), static_cast<R*>(nullptr), all.masked + index * p.channels);
  if (span.begin >= plan.answering[image]) return true;
  for (std::int64_t j = 0; j < plan.block; ++j) {
    const std::int64_t to = index * plan.block + j, token = j < span.size() ? plan.at(image, span.begin + j) : -1;
    all.bias[to] = token < 0 ? -infinity : plan.key_bias(image, token);
    all.factor[to] = token < 0 ? R(0) : R(p.scale) * plan.weight(image, token);
    all.most[to] = token < 0 ? infinity : softmax[2 * image * p.tokens + token];
    all.inverse[to] = token < 0 ? R(0) : 1 / softmax[(2 * image + 1) * p.tokens + token];
  }
  plan.gather(feat, image, span, block.features.planes);
  if (!all.features[index].set(plan, span.size(), block.features.planes)) return false;
  if (!asks) return true;
  // g . e = g . f + g . (e - f). Where a token attends to itself above all, its g . f meets the one of the matrix
  // product, summed in this very order, and they are to cancel to the last bit.
  R *itself = all.mean + index * plan.block, *rest = block.rest, *mixed = block.mixed;
  for (std::int64_t j = 0; j < plan.block; ++j) rest[j] = 0;
  for (std::int64_t c = 0; c < p.channels; ++c) {
    const In* plane = out + (image * p.channels + c) * p.tokens;
    for (std::int64_t j = 0; j < span.size(); ++j) mixed[j] = to_real(plane[plan.at(image, span.begin + j)]);
    for (std::int64_t j = 0; j < span.size(); j += lanes<T>) {
      const std::int64_t at = c * plan.plane_stride() + j;
      const Vec<T> f = load(block.features.planes + at), g = load(block.gradients.planes + at);
      store(itself + j, load(itself + j) + g * f);
      store(rest + j, load(rest + j) + g * (load(mixed + j) - f));
    }
  }
  for (std::int64_t j = 0; j < span.size(); ++j) itself[j] += rest[j];  // behind them `mixed` is another block's
  return all.gradients[index].set(plan, span.size(), block.gradients.planes);
}

template <class T, class In>
Status backward(const UnmaskAttention& p, const In* out, const Real<T>* softmax, const In* grad_out, In* grad_feat) {
  const In* feat = static_cast<const In*>(p.feat);
  const Plan<T> plan(p, true);
  if (!plan) return Status::out_of_memory;
  Tokens<T> all(plan);
  if (!all) return Status::out_of_memory;

  const auto meet_all = [&](Tile<T>& tile, std::int64_t own, std::int64_t offset) {
    const std::int64_t image = own / plan.blocks, asking = plan.asking[image], answering = plan.answering[image];
    const Span span = plan.tile(own, offset);
    std::memset(static_cast<void*>(tile.sums), 0, std::size_t(tile_rows * plan.wide) * sizeof(Real<T>));
    for (std::int64_t b = 0; b < plan.blocks && span.begin < answering; ++b) {  // the others meet nobody
      const Span others = plan.span(image, b);
      const bool asks = span.begin < asking, asked_by = others.begin < asking;
      if (others.begin >= answering || !(asks || asked_by)) break;
      tile.meet(all, own, offset, span.size(), asks, image * plan.blocks + b, round_up(others.size(), lanes<T>),
                asked_by);
    }
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const Real<T> handed = plan.mean(all.masked, image, c);
      for (std::int64_t r = 0; r < span.size(); ++r) {
        const std::int64_t token = plan.at(image, span.begin + r);
        from_real(tile.sums[r * plan.wide + c] + handed * plan.key_weight(image, token),
                  grad_feat + (image * p.channels + c) * p.tokens + token);
      }
    }
  };
  return for_each_tile<Tile<T>>(
      plan, [&](Tile<T>& tile, std::int64_t i) { return pack(plan, feat, out, softmax, grad_out, i, tile.block, all); },
      meet_all);
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
