// Shared by the forward and the backward of unmask_attention: sorted tokens, packed for matrix products.
//
// The tokens of an image are sorted: first the queries (weight != 0), then the masked tokens. As Q = w F and K = V = F,
// the product f_i . f_j gives both the score of query i with key j and that of query j with key i. Scores are computed
// for a tile (`tile_rows` tokens of a block) with a block of tokens; the matrix of all scores is never stored.
#pragma once

#include <limits>
#include <memory>
#include <new>
#include <numeric>

#include "../common/gemm.h"
#include "../entries.h"
#include "../common/tasks.h"
#include "../common/transpose.h"

namespace inr {
namespace INR_ISA {
namespace {

constexpr int tile_rows = 4 * block_rows;

// The type of the operands of matrix products for bfloat16 input.
#if defined(__AVX512BF16__)
using Bf16Operand = bf16;
#else
using Bf16Operand = float;
#endif

template <int n>
struct DoublesOf {
  typedef double type __attribute__((vector_size(n * sizeof(double))));
};
// A vector of lanes<T> doubles.
template <class T>
using Doubles = typename DoublesOf<lanes<T>>::type;

// Reduces the elements of a vector by f.
template <class V, class F>
INR_INLINE auto reduce(V v, F f) {
  auto out = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); ++i) out = f(out, v[i]);
  return out;
}

// Positions [begin, end) in the sorted order of an image's tokens.
struct Span {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

// How the problem is divided into blocks and tiles, and the order of the tokens. T: the type of the products' operands.
template <class T>
struct UnmaskPlan {
  using R = Real<T>;

  // separate: no block contains both queries and masked tokens.
  UnmaskPlan(const UnmaskAttention& problem, bool separate) : p(problem), separate(separate) {
    stride = row_stride<T>(p.channels);
    wide = round_up(p.channels, panel<T>);
    constexpr std::int64_t unit = std::lcm(tile_rows, panel<T>), max_block = 512 / unit * unit;
    block = clamp((32 << 10) / p.channels / unit * unit, unit, clamp(round_up(p.tokens, unit), unit, max_block));
    tiles = block / tile_rows;
    blocks = p.tokens / block + 2;
    order.resize(p.batch * p.tokens);
    for (Buffer<std::int64_t>* counts : {&query_count, &key_count}) counts->resize(p.batch);
    key_weight_sum.resize(p.batch);
    if (!*this) return;
    double products = 0;
    for (std::int64_t b = 0; b < p.batch; ++b) {
      sort(b);
      // Packing a token costs as much as 40 pairs.
      products += double(query_count[b]) * double(key_count[b]) + 40 * double(p.tokens);
    }
    threads = useful_threads(4 * products * double(p.channels), p.threads);
  }
  explicit operator bool() const { return order && query_count && key_count && key_weight_sum; }

  R weight(std::int64_t image, std::int64_t token) const {
    return static_cast<const R*>(p.weight)[image * p.tokens + token];
  }
  R key_weight(std::int64_t image, std::int64_t token) const { return p.mask_keys ? weight(image, token) : R(1); }
  // The logarithm of the key weight, which is added to the score.
  R key_bias(std::int64_t image, std::int64_t token) const {
    return p.mask_keys ? R(__builtin_log(double(weight(image, token)))) : R(0);
  }
  // The token at position i of the image's order.
  std::int64_t at(std::int64_t image, std::int64_t i) const { return order[image * p.tokens + i]; }
  // The tokens of block b of an image; empty for the blocks after the last.
  Span span(std::int64_t image, std::int64_t b) const {
    const std::int64_t first = separate ? query_count[image] : key_count[image], before = (first + block - 1) / block;
    const std::int64_t begin = b < before ? b * block : first + (b - before) * block;
    const std::int64_t limit = b < before ? first : p.tokens;
    return {begin, clamp(begin + block, begin, limit < begin ? begin : limit)};
  }

  // The tokens of the tile that begins at `offset` of a block; index: [batch * blocks] of the block.
  Span tile(std::int64_t index, std::int64_t offset) const {
    const Span s = span(index / blocks, index % blocks);
    return {s.begin + offset, clamp(s.begin + offset + tile_rows, s.begin + offset, s.end)};
  }

  // Gathers the tokens of a span as columns, converted to T. from: [batch, channels, tokens]; planes:
  // [channels][plane_stride()], set to zero up to a whole vector after the last token
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
  // to[c] = sum over j of planes[c][j] weight[j]; without weight, of planes[c][j].
  // planes: [channels][plane_stride()]; weight: [round_up(count, lanes)], zero after the last token; to: [channels]
  void add_up(const T* planes, std::int64_t count, const R* weight, double* to) const {
    for (std::int64_t c = 0; c < p.channels; ++c) {
      Doubles<T> partial{};
      for (std::int64_t j = 0; j < count; j += lanes<T>) {
        const Doubles<T> value = __builtin_convertvector(load(planes + c * plane_stride() + j), Doubles<T>);
        partial += weight ? value * __builtin_convertvector(load(weight + j), Doubles<T>) : value;
      }
      to[c] = reduce(partial, [](double a, double b) { return a + b; });
    }
  }
  // The mean over the keys, which a masked token attends to equally. sums: [batch][blocks][channels]
  R mean(const double* sums, std::int64_t image, std::int64_t c) const {
    double sum = 0;
    for (std::int64_t b = 0; b < blocks; ++b) sum += sums[(image * blocks + b) * p.channels + c];
    return R(key_weight_sum[image] > 0 ? sum / key_weight_sum[image] : 0);
  }
  // One vector longer than the block, so that rows fall into different cache sets.
  std::int64_t plane_stride() const { return block + vector_bytes / std::int64_t(sizeof(T)); }

  const UnmaskAttention& p;
  const bool separate;
  std::int64_t stride, wide;          // row strides of [tokens][channels]: of a left operand, of sums
  std::int64_t block, tiles, blocks;  // tokens and tiles of a block, blocks of an image (upper bound)
  int threads = 1;
  Buffer<std::int64_t> order;                   // [batch][tokens]
  Buffer<std::int64_t> query_count, key_count;  // [batch]; queries and keys are the first of the order
  Buffer<double> key_weight_sum;                // [batch]

 private:
  void sort(std::int64_t image) {
    std::int64_t* to = order + image * p.tokens;
    std::int64_t n = 0, rest = p.tokens;
    for (std::int64_t t = 0; t < p.tokens; ++t) {  // without branches, which would be mispredicted
      const bool is_query = weight(image, t) != 0;
      to[is_query ? n : rest - 1] = t;
      n += is_query, rest -= !is_query;
      key_weight_sum[image] += double(key_weight(image, t));
    }
    query_count[image] = n;
    key_count[image] = p.mask_keys ? n : p.tokens;
  }
};

// Calls pack(worker, block) for the blocks of all images, then process(worker, block, offset) for all of their tiles.
// Each thread has its own worker. If there are enough images for the threads, each task is a whole image, so that the
// packed tokens are still in the thread's cache.
template <class Worker, class P, class Pack, class Attend>
Status for_each_tile(const P& plan, Pack&& pack, Attend&& process) {
  const auto for_each = [&](std::int64_t count, auto&& work) {
    return for_each_task(plan.threads, count, [&] { return Worker(plan); }, work);
  };
  const std::int64_t batch = plan.p.batch, blocks = plan.blocks, tiles = plan.tiles;
  const auto attend_tile = [&](Worker& worker, std::int64_t i) {
    const std::int64_t offset = i % tiles * tile_rows;
    if (plan.tile(i / tiles, offset).size() > 0) process(worker, i / tiles, offset);
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

// Tokens before they are packed.
template <class T>
struct TokenStaging {
  explicit TokenStaging(const UnmaskPlan<T>& plan)
      : planes(round_up(plan.p.channels, lanes<T>) * plan.plane_stride()) {}
  explicit operator bool() const { return bool(planes); }
  Buffer<T> planes;  // [round_up(channels, lanes)][plane_stride()]
};

// The features of a block of tokens, or their gradients, as left and right operands of matrix products.
template <class T>
struct PackedTokens {
  Buffer<T> rows;                      // [round_up(tokens, block_rows)][stride]
  PackedMatrix<T> channels_by_tokens;  // [channels, tokens]
  PackedMatrix<T> tokens_by_channels;  // [tokens, channels]

  // planes: [channels][plane_stride()], from UnmaskPlan::gather
  bool set(const UnmaskPlan<T>& plan, std::int64_t count, const T* planes) {
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
    return channels_by_tokens.pack(planes, count, channels, 1, plan.plane_stride()) &&
           tokens_by_channels.pack(rows, channels, count, 1, plan.stride);
  }
};

// [batch][blocks], empty; nullptr if out of memory.
template <class T>
std::unique_ptr<PackedTokens<T>[]> packed_tokens(const UnmaskPlan<T>& plan) {
  const std::size_t blocks = std::size_t(plan.p.batch * plan.blocks);
  return std::unique_ptr<PackedTokens<T>[]>(new (std::nothrow) PackedTokens<T>[blocks]);
}

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
