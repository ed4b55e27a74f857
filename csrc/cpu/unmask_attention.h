// What the forward and the backward kernels of unmask_attention share: tokens in order, packed for products.
//
// An image's tokens are taken with those that ask (weight != 0) first, then those that only answer. As Q = w F and
// K = V = F, one score f_i . f_j serves both of its tokens. Scores live in a tile of `tile_rows` tokens against a
// block of tokens, never as a matrix of the image.
#pragma once

#include <atomic>
#include <limits>
#include <memory>
#include <new>

#include "../common/threads.h"
#include "gemm.h"
#include "kernels.h"

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

// Tokens as the right-hand sides of products.
template <class T>
struct Operands {
  Packed<T> across;  // B(c, j) = token j's channel c
  Packed<T> along;   // B(j, c)
  bool pack(const T* tokens, std::int64_t count, std::int64_t channels, std::int64_t stride) {
    return across.pack(tokens, count, channels, stride, 1) && along.pack(tokens, channels, count, 1, stride);
  }
};

template <class T>
struct Plan {
  using R = Real<T>;

  explicit Plan(const UnmaskAttention& problem) : p(problem) {
    stride = row_stride<T>(p.channels);
    wide = round_up(p.channels, panel<T>);
    const std::int64_t fits = round_up((32 << 10) / p.channels, panel<T>);
    block = fits < panel<T> ? panel<T> : fits > 512 ? 512 : fits;
    blocks = (p.tokens + block - 1) / block;
    tiles = (p.tokens + tile_rows - 1) / tile_rows;
    order.resize(p.batch * p.tokens);
    asking.resize(p.batch);
    answering.resize(p.batch);
    answers.resize(p.batch);
    if (!order || !asking || !answering || !answers) return;
    double products = 0;
    for (std::int64_t b = 0; b < p.batch; ++b) {
      sort(b);
      products += double(asking[b]) * double(answering[b]);
    }
    const double useful = 4 * products * double(p.channels) / 2e7 + 1;
    threads = useful < p.threads ? int(useful) : p.threads;
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
  std::int64_t block_end(std::int64_t image, std::int64_t i) const {
    return answering[image] < i + block ? answering[image] : i + block;
  }

  // Tokens [i, end) of the order, one a row, in the type of the products.
  template <class In>
  void gather(const In* from, std::int64_t image, std::int64_t i, std::int64_t end, T* to) const {
    for (std::int64_t c = 0; c < p.channels; ++c) {
      const In* plane = from + (image * p.channels + c) * p.tokens;
      for (std::int64_t r = i; r < end; ++r) from_real(R(to_real(plane[at(image, r)])), to + (r - i) * stride + c);
    }
  }

  const UnmaskAttention& p;
  std::int64_t stride, wide;          // of a row of channels: as a left-hand side, as a sum
  std::int64_t block, blocks, tiles;  // tokens of a block; blocks and tiles of an image at most
  int threads = 1;
  Buffer<std::int64_t> order;               // [batch][tokens]
  Buffer<std::int64_t> asking, answering;   // [batch] the first tokens of the order
  Buffer<double> answers;                   // [batch] sum of the key weights

 private:
  void sort(std::int64_t image) {
    std::int64_t* to = order + image * p.tokens;
    std::int64_t n = 0;
    for (std::int64_t t = 0; t < p.tokens; ++t)
      if (weight(image, t) != 0) to[n++] = t;
    asking[image] = n;
    answering[image] = p.mask_keys ? n : p.tokens;
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      if (weight(image, t) == 0) to[n++] = t;
      answers[image] += double(key_weight(image, t));
    }
  }
};

// work(worker, i) for i in [0, count); every thread has a worker of its own.
template <class Worker, class P, class F>
Status for_each(const P& plan, std::int64_t count, F&& work) {
  std::atomic<std::int64_t> next{0};
  std::atomic<Status> status{Status::ok};
  parallel(plan.threads, [&](int) {
    Worker worker(plan);
    if (!worker) status = Status::out_of_memory;
    for (std::int64_t i; status == Status::ok && (i = next.fetch_add(1)) < count;)
      if (!work(worker, i)) status = Status::out_of_memory;
  });
  return status;
}

// Token rows on their way into Operands.
template <class T>
struct Staging {
  explicit Staging(const Plan<T>& plan) : rows(plan.block * plan.stride), more(plan.block * plan.stride) {}
  explicit operator bool() const { return rows && more; }
  Buffer<T> rows, more;
};

template <class T>
std::unique_ptr<Operands<T>[]> operands(const Plan<T>& plan) {
  return std::unique_ptr<Operands<T>[]>(new (std::nothrow) Operands<T>[std::size_t(plan.p.batch * plan.blocks)]);
}

template <class V, class F>
INR_INLINE auto reduce(V v, F f) {
  auto out = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); ++i) out = f(out, v[i]);
  return out;
}

}  // namespace
}  // namespace INR_ISA
}  // namespace inr
