// What the forward and the backward kernels of unmask_attention share: tokens in order, packed for products.
//
// An image's tokens are taken with those that ask (weight != 0) first, then those that only answer. As Q = w F and
// K = V = F, one score f_i . f_j serves both of its tokens. Scores live in a tile, `tile_rows` tokens of a block,
// against a block of tokens, never as a matrix of the image.
#pragma once

#include <limits>
#include <memory>
#include <new>
#include <numeric>

#include "gemm.h"
#include "kernels.h"
#include "tasks.h"
#include "transpose.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr int tile_rows = 4 * block_rows;

// What bfloat16 is multiplied in.
#if defined(__AVX512BF16__)
using Multiplied = bf16;
#else
using Multiplied = float;
#endif

template <int n>
struct WideOf {
  typedef double type __attribute__((vector_size(n * sizeof(double))));
};
// As many doubles as a vector has elements.
template <class T>
using Wide = typename WideOf<lanes<T>>::type;

template <class V, class F>
INR_INLINE auto reduce(V v, F f) {
  auto out = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); ++i) out = f(out, v[i]);
  return out;
}

struct Span {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

template <class T>
struct Plan {
  using R = Real<T>;

  // apart: no block has both tokens that ask and tokens that only answer.
  Plan(const UnmaskAttention& problem, bool apart) : p(problem), apart(apart) {
    stride = row_stride<T>(p.channels);
    wide = round_up(p.channels, panel<T>);
    constexpr std::int64_t whole = std::lcm(tile_rows, panel<T>), most = 512 / whole * whole;
    block = clamp((32 << 10) / p.channels / whole * whole, whole, clamp(round_up(p.tokens, whole), whole, most));
    tiles = block / tile_rows;
    blocks = p.tokens / block + 2;
    order.resize(p.batch * p.tokens);
    for (Buffer<std::int64_t>* counts : {&asking, &answering}) counts->resize(p.batch);
    answers.resize(p.batch);
    if (!*this) return;
    double products = 0;
    for (std::int64_t b = 0; b < p.batch; ++b) {
      sort(b);
      products += double(asking[b]) * double(answering[b]) + 40 * double(p.tokens);  // that many pairs cost its packing
    }
    threads = useful_threads(4 * products * double(p.channels), p.threads);
  }
  explicit operator bool() const { return order && asking && answering && answers; }

  R weight(std::int64_t image, std::int64_t token) const {
    return static_cast<const R*>(p.weight)[image * p.tokens + token];
  }
  R key_weight(std::int64_t image, std::int64_t token) const { return p.mask_keys ? weight(image, token) : R(1); }
  // The log of the key weight, which joins the score.
  R key_bias(std::int64_t image, std::int64_t token) const {
    return p.mask_keys ? R(__builtin_log(double(weight(image, token)))) : R(0);
  }
  std::int64_t at(std::int64_t image, std::int64_t i) const { return order[image * p.tokens + i]; }
  // Tokens of an image's order; empty from some block on.
  Span span(std::int64_t image, std::int64_t b) const {
    const std::int64_t first = apart ? asking[image] : answering[image], before = (first + block - 1) / block;
    const std::int64_t begin = b < before ? b * block : first + (b - before) * block;
    const std::int64_t limit = b < before ? first : p.tokens;
    return {begin, clamp(begin + block, begin, limit < begin ? begin : limit)};
  }

  // Those of a tile that begins at `offset` of a block of all images'.
  Span tile(std::int64_t index, std::int64_t offset) const {
    const Span s = span(index / blocks, index % blocks);
    return {s.begin + offset, clamp(s.begin + offset + tile_rows, s.begin + offset, s.end)};
  }

  // Tokens of the order, one a column, in the type of the products: [channels][plane_stride()].
  template <class In>
  void gather(const In* from, std::int64_t image, Span span, T* planes) const {
    const std::int64_t* token = order + image * p.tokens + span.begin;
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const In* plane = from + (image * p.channels + c) * p.tokens;
      T* to = planes + c * plane_stride();
      for (std::int64_t j = 0; j < span.size(); ++j) from_real(R(to_real(plane[token[j]])), to + j);
      for (std::int64_t j = span.size(); j % lanes<T>; ++j) to[j] = T{};
    }
  }
  // to[c] = sum over j of planes[c][j] weight[j], which are 0 behind the last; weight == nullptr: of planes[c][j].
  void add_up(const T* planes, std::int64_t count, const R* weight, double* to) const {
    for (std::int64_t c = 0; c < p.channels; ++c) {
      Wide<T> partial{};
      for (std::int64_t j = 0; j < count; j += lanes<T>) {
        const Wide<T> value = __builtin_convertvector(load(planes + c * plane_stride() + j), Wide<T>);
        partial += weight ? value * __builtin_convertvector(load(weight + j), Wide<T>) : value;
      }
      to[c] = reduce(partial, [](double a, double b) { return a + b; });
    }
  }
  // What a token of weight 0 has of all blocks' `sums`, [batch][blocks][channels]: their mean over the keys.
  R mean(const double* sums, std::int64_t image, std::int64_t c) const {
    double sum = 0;
    for (std::int64_t b = 0; b < blocks; ++b) sum += sums[(image * blocks + b) * p.channels + c];
    return R(answers[image] > 0 ? sum / answers[image] : 0);
  }
  // A vector longer than the block, so that rows fall into different cache sets.
  std::int64_t plane_stride() const { return block + vector_bytes / std::int64_t(sizeof(T)); }

  const UnmaskAttention& p;
  const bool apart;
  std::int64_t stride, wide;          // of a row of channels: as a left-hand side, as a sum
  std::int64_t block, tiles, blocks;  // tokens and tiles of a block, blocks of an image, at most
  int threads = 1;
  Buffer<std::int64_t> order;               // [batch][tokens]
  Buffer<std::int64_t> asking, answering;   // [batch] the first tokens of the order
  Buffer<double> answers;                   // [batch] sum of the key weights

 private:
  void sort(std::int64_t image) {
    std::int64_t* to = order + image * p.tokens;
    std::int64_t n = 0, rest = p.tokens;
    for (std::int64_t t = 0; t < p.tokens; ++t) {  // no branch: a mask is not to be guessed
      const bool asks = weight(image, t) != 0;
      to[asks ? n : rest - 1] = t;
      n += asks, rest -= !asks;
      answers[image] += double(key_weight(image, t));
    }
    asking[image] = n;
    answering[image] = p.mask_keys ? n : p.tokens;
  }
};

// pack(worker, block) for the blocks of all images, then attend(worker, block, offset) for all of their tiles; every
// thread has a worker of its own. Where there are images enough for the threads, a thread takes them one by one: what
// it packed is still in its cache.
template <class Worker, class P, class Pack, class Attend>
Status for_each_tile(const P& plan, Pack&& pack, Attend&& attend) {
  const auto for_each = [&](std::int64_t count, auto&& work) {
    return for_each_task(plan.threads, count, [&] { return Worker(plan); }, work);
  };
  const std::int64_t batch = plan.p.batch, blocks = plan.blocks, tiles = plan.tiles;
  const auto attend_tile = [&](Worker& worker, std::int64_t i) {
    const std::int64_t offset = i % tiles * tile_rows;
    if (plan.tile(i / tiles, offset).size() > 0) attend(worker, i / tiles, offset);
    return Status::ok;
  };
  const auto pack_block = [&](Worker& worker, std::int64_t i) {
    return pack(worker, i) ? Status::ok : Status::out_of_memory;
  };
  if (batch < 4 * plan.threads) {
    const Status status = for_each(batch * blocks, pack_block);
    return status == Status::ok ? for_each(batch * blocks * tiles, attend_tile) : status;
  }
  return for_each(batch, [&](Worker& worker, std::int64_t image) {
    Status status = Status::ok;
    for (std::int64_t b = 0; b < blocks && status == Status::ok; ++b) status = pack_block(worker, image * blocks + b);
    for (std::int64_t i = 0; i < blocks * tiles && status == Status::ok; ++i)
      status = attend_tile(worker, image * blocks * tiles + i);
    return status;
  });
}

// Columns of tokens on their way into Operands.
template <class T>
struct Staging {
  explicit Staging(const Plan<T>& plan) : planes(round_up(plan.p.channels, lanes<T>) * plan.plane_stride()) {}
  explicit operator bool() const { return bool(planes); }
  Buffer<T> planes;
};

// A block of tokens' features, or of their gradients, as both sides of products.
template <class T>
struct Operands {
  Buffer<T> rows;    // [tokens, whole block_rows of them][stride]
  Packed<T> across;  // B(c, j) = token j's channel c
  Packed<T> along;   // B(j, c)

  // planes: as of Plan::gather.
  bool set(const Plan<T>& plan, std::int64_t count, const T* planes) {
    const std::int64_t channels = plan.p.channels;
    if (!rows.resize(round_up(count, block_rows) * plan.stride)) return false;
    for (std::int64_t c = 0; c < channels; c += lanes<T>)
      for (std::int64_t j = 0; j < count; j += lanes<T>) {
        Vec<T> tile[lanes<T>];
        for (int k = 0; k < lanes<T>; ++k) tile[k] = load(planes + (c + k) * plan.plane_stride() + j);
        transpose<T>(tile);
        for (int k = 0; k < lanes<T>; ++k)
          if (j + k < count) store(rows + (j + k) * plan.stride + c, tile[k]);
      }
    return across.pack(planes, count, channels, 1, plan.plane_stride()) &&
           along.pack(rows, channels, count, 1, plan.stride);
  }
};

template <class T>
std::unique_ptr<Operands<T>[]> operands(const Plan<T>& plan) {
  return std::unique_ptr<Operands<T>[]>(new (std::nothrow) Operands<T>[std::size_t(plan.p.batch * plan.blocks)]);
}

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
