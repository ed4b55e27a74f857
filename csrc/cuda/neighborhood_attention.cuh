// Shared by the tensor-core kernels of neighborhood_attention: the problem on the device, tiles of queries, and stages
// of tokens in shared memory.
//
// A block takes a tile of 8 x 8 pixels of one residue class (pixels whose positions are equal modulo the dilation), of
// one head of one image. Heads of `dim` channels are padded to D. A chunk is 8 channels, 16 bytes.
#pragma once

#include "cuda/ptx.cuh"

namespace inr {
namespace cuda {

constexpr int side = 8, columns = 16;         // of a tile; of a stage
constexpr int warps = 4, threads = 32 * warps;
constexpr int stage_chunks = 1024;            // of the keys, or the values, in a stage
constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

struct Side {
  int length, kernel, dilation, stride, tiles;  // tiles: of the longest residue class
  bool causal;

  __device__ __forceinline__ int class_size(int residue) const { return (length - residue + dilation - 1) / dilation; }
};

// Positions [begin, end) within a residue class.
struct Range {
  int begin, end;

  __device__ __forceinline__ bool contains(int i) const { return i >= begin && i < end; }
  // The part before `last`.
  __device__ __forceinline__ Range until(int last) const { return {begin, max(begin, min(end, last))}; }
};

// NATTEN's rule: the keys of the query at position i of its residue class, which has n positions.
__device__ __forceinline__ Range window(const Side& a, int i, int n) {
  const int group = a.stride == 1 ? i : i / a.stride * a.stride;
  if (a.causal) return {max(min(group + a.stride - 1, n - 1) - a.kernel + 1, 0), i + 1};
  const int leader = min(group + a.stride / 2, n - 1);
  const int begin = min(max(leader - a.kernel / 2, 0), n - a.kernel);
  return {begin, begin + a.kernel};
}

// [batch, height, width, heads, dim], by strides; the last is 1.
struct Map {
  std::uint16_t* data;
  std::int64_t batch, row, column, head;
  bool aligned;  // every token is aligned to 16 bytes, and consists of whole chunks
};

struct Attention {
  Side y, x;
  int heads, dim, stage_rows;
  float scale;        // of the scores in units of log2(e)
  const float* bias;  // [heads, 2 y.kernel - 1, 2 x.kernel - 1] or nullptr
  Map query, key, value;
};

// A block's tile: its first pixel's position in the class, and the class.
struct Tile {
  int head, y, x, residue_y, residue_x, rows, columns;  // rows, columns: of the class
  std::int64_t image;

  __device__ __forceinline__ explicit Tile(const Attention& p) {
    unsigned rest = blockIdx.x;
    const auto take = [&](int count) {
      const unsigned quotient = rest / unsigned(count), remainder = rest - quotient * unsigned(count);
      rest = quotient;
      return int(remainder);
    };
    head = take(p.heads);  // heads are adjacent in memory
    x = take(p.x.tiles) * side, residue_x = take(p.x.dilation);
    y = take(p.y.tiles) * side, residue_y = take(p.y.dilation);
    image = rest;
    rows = p.y.class_size(residue_y), columns = p.x.class_size(residue_x);
  }
  // Classes differ in size by one, so that the last tile of some is empty.
  __device__ __forceinline__ bool empty() const { return y >= rows || x >= columns; }
  // The keys that the windows of the tile's queries cover.
  __device__ __forceinline__ Range key_rows(const Side& a) const {
    return {window(a, y, rows).begin, window(a, min(y + side, rows) - 1, rows).end};
  }
  __device__ __forceinline__ Range key_columns(const Side& a) const {
    return {window(a, x, columns).begin, window(a, min(x + side, columns) - 1, columns).end};
  }
  // The token at a position in the class.
  __device__ __forceinline__ std::uint16_t* at(const Map& m, const Attention& p, int row, int column) const {
    return m.data + image * m.batch + head * m.head + (residue_y + std::int64_t(row) * p.y.dilation) * m.row +
           (residue_x + std::int64_t(column) * p.x.dilation) * m.column;
  }
};

// A lane's two pixels of a tile, in rows g and g + 8 of its warp's products: one below the other.
struct Pair {
  int y, x;
  bool live[2];  // whether they exist

  __device__ __forceinline__ explicit Pair(const Tile& tile)
      : y(tile.y + threadIdx.x / 32 * 2), x(tile.x + threadIdx.x % 32 / 4) {
    for (int i = 0; i < 2; ++i) live[i] = y + i < tile.rows && x < tile.columns;
  }
  // The index of pixel i in [batch, height, width, heads].
  __device__ __forceinline__ std::int64_t index(const Attention& p, const Tile& tile, int i) const {
    const std::int64_t at_y = tile.residue_y + std::int64_t(y + i) * p.y.dilation;
    const std::int64_t at_x = tile.residue_x + std::int64_t(x) * p.x.dilation;
    return ((tile.image * p.y.length + at_y) * p.x.length + at_x) * p.heads + tile.head;
  }
};

// Such a pair as queries: what they see, and their bias.
struct Queries : Pair {
  Range seen_x, seen_y[2];  // of a query outside the map: nothing
  std::int64_t bias[2];     // the index of the bias of the key at (0, 0)

  __device__ __forceinline__ Queries(const Attention& p, const Tile& tile) : Pair(tile) {
    seen_x = x < tile.columns ? window(p.x, x, tile.columns) : Range{0, 0};
    for (int i = 0; i < 2; ++i) {
      seen_y[i] = y + i < tile.rows ? window(p.y, y + i, tile.rows) : Range{0, 0};
      const std::int64_t row = std::int64_t(tile.head) * (2 * p.y.kernel - 1) + p.y.kernel - 1 - (y + i);
      bias[i] = row * (2 * p.x.kernel - 1) + p.x.kernel - 1 - x;
    }
  }
  // The rows of keys that the queries of the warp see.
  __device__ __forceinline__ Range rows() const { return {seen_y[0].begin, max(seen_y[0].end, seen_y[1].end)}; }
  // -infinity for those of this lane's columns that are outside the window, else 0. column: the first of the 16
  __device__ __forceinline__ void mask_columns(int column, float (&masked)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) masked[i] = seen_x.contains(column + column_of(i)) ? 0 : -INFINITY;
  }
  // Of the four results of a lane in a row of products [8, 16]: the column, from the first of the 16 on.
  __device__ __forceinline__ static int column_of(int i) { return threadIdx.x % 4 * 2 + i / 2 * 8 + i % 2; }

  // From products of queries and keys to scores in units of log2(e), -infinity outside the windows.
  // seen: rows; masked: of mask_columns(column)
  __device__ __forceinline__ void to_scores(const Attention& p, int key, int column, const Range (&seen)[2],
                                            const float (&masked)[4], float (&scores)[2][4]) const {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const std::int64_t at = bias[q] + key * (2 * p.x.kernel - 1) + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][2 * q + i % 2];
        const float mask = seen[q].contains(key) ? masked[i] : -INFINITY;
        score = fmaf(score, p.scale, mask);
        if (p.bias && mask == 0) score = fmaf(p.bias[at + column_of(i)], log2_e, score);
      }
    }
  }
};

// The first `count` of the 8 channels at `from`, zeros after them.
__device__ __forceinline__ uint4 load_chunk(const std::uint16_t* from, int count, bool aligned) {
  if (count <= 0) return {0, 0, 0, 0};
  if (aligned) return *reinterpret_cast<const uint4*>(from);
  unsigned pairs[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) pairs[i / 2] |= unsigned(from[i]) << (i % 2 * 16);
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Copies such a chunk.
__device__ __forceinline__ void store_chunk(const std::uint16_t* from, int count, uint4* to) {
#pragma unroll 1
  for (int i = 0; i < 8; ++i) reinterpret_cast<std::uint16_t*>(to)[i] = i < count ? from[i] : 0;
}

// Where a chunk of a token of a stage is in shared memory. The chunks of a token are permuted so that neither eight
// tokens' chunks of one index (`load_transposed`) nor four chunks of two tokens (`load_keys`) share a bank.
template <int D>
__device__ __forceinline__ int place(int token, int chunk) {
  const int order = (token & 1) << 2 | (token >> 1 & 3);
  return token * (D / 8) + (chunk ^ (order & (D / 8 - 1)));
}

// Copies `count` rows of 16 columns, from a position in the class on, to shared memory; zeros from `end` on.
// to: [count * 16 tokens, D / 8 chunks], as `place` says; arrives with the copies of this thread
template <int D>
__device__ __forceinline__ void copy_stage(const Attention& p, const Tile& tile, const Map& from, int row, int column,
                                           int count, int end, uint4* to) {
  constexpr int chunks = D / 8, tokens = threads / chunks;  // at once
  constexpr int rows = tokens > columns ? tokens / columns : 1;
  const int chunk = threadIdx.x % chunks, token = threadIdx.x / chunks, first = token / columns;
  const std::int64_t row_step = from.row * p.y.dilation * rows;
#pragma unroll
  for (int c = token % columns; c < columns; c += tokens) {
    const int channels = column + c < end ? p.dim - 8 * chunk : 0;
    const std::uint16_t* at = tile.at(from, p, row + first, column + c) + 8 * chunk;
    uint4* slot = to + place<D>(first * columns + c, chunk);  // a multiple of 8 tokens further, the order is the same
#pragma unroll 1
    for (int r = first; r < count; r += rows, at += row_step, slot += rows * columns * chunks) {
      if (channels > 0 && from.aligned)
        copy_async(slot, at);
      else
        store_chunk(at, channels, slot);
    }
  }
}

// The left fragments of the channels of a lane's pixels, zeros for those that do not exist. The order of a product's
// inner dimension is arbitrary; in this one lane 4 g + t has the channels 8 t ... 8 t + 7 of every 32, a load of 16
// bytes.
template <int D>
__device__ __forceinline__ void load_rows(const Attention& p, const Tile& tile, const Pair& pair, const Map& from,
                                          unsigned (&to)[D / 16][4]) {
  const int t = threadIdx.x % 4;
  const std::uint16_t* tokens[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) tokens[i] = pair.live[i] ? tile.at(from, p, pair.y + i, pair.x) : from.data;
#pragma unroll
  for (int k = 0; k < D / 32; ++k) {
    const int channel = 32 * k + 8 * t;
    uint4 v[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      v[i] = load_chunk(tokens[i] + channel, pair.live[i] ? p.dim - channel : 0, from.aligned);
    to[2 * k][0] = v[0].x, to[2 * k][1] = v[1].x, to[2 * k][2] = v[0].y, to[2 * k][3] = v[1].y;
    to[2 * k + 1][0] = v[0].z, to[2 * k + 1][1] = v[1].z, to[2 * k + 1][2] = v[0].w, to[2 * k + 1][3] = v[1].w;
  }
}

// products [2][4] = rows [16, D] times the transpose of the 16 tokens from `token` of a stage on.
template <Type type, int D>
__device__ __forceinline__ void multiply_transposed(const unsigned (&rows)[D / 16][4], const uint4* stage, int token,
                                                    float (&products)[2][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) products[i / 4][i % 4] = 0;
#pragma unroll
  for (int k = 0; k < D / 32; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 b = stage[place<D>(token + 8 * half + lane / 4, 4 * k + lane % 4)];
      mma<type>(products[half], rows[2 * k], b.x, b.y);
      mma<type>(products[half], rows[2 * k + 1], b.z, b.w);
    }
}

// sums [D / 8][4] += factors [16, 16], products of the same layout, times the 16 tokens from `token` of a stage on.
template <Type type, int D>
__device__ __forceinline__ void multiply(const float (&factors)[2][4], const uint4* stage, int token,
                                         float (&sums)[D / 8][4]) {
  const int lane = threadIdx.x % 32;
  unsigned left[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = pack<type>(factors[i / 2][i % 2 * 2], factors[i / 2][i % 2 * 2 + 1]);
#pragma unroll
  for (int n = 0; n < D / 8; n += 2) {
    unsigned b[4];
    load_transposed(b, stage + place<D>(token + lane % 16, n + lane / 16));
    mma<type>(sums[n], left, b[0], b[1]);
    mma<type>(sums[n + 1], left, b[2], b[3]);
  }
}

// Stores the sums of a lane's pixel i, times a factor.
template <Type type, int D>
__device__ __forceinline__ void store_row(const Attention& p, const Tile& tile, const Pair& pair, int i,
                                          const float (&sums)[D / 8][4], float factor, const Map& to) {
  const int t = threadIdx.x % 4;
  std::uint16_t* token = tile.at(to, p, pair.y + i, pair.x);
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const int channel = 8 * n + 2 * t;
    const unsigned values = pack<type>(sums[n][2 * i] * factor, sums[n][2 * i + 1] * factor);
    if (to.aligned) {
      if (channel < p.dim) *reinterpret_cast<unsigned*>(token + channel) = values;
    } else {
      if (channel < p.dim) token[channel] = std::uint16_t(values);
      if (channel + 1 < p.dim) token[channel + 1] = std::uint16_t(values >> 16);
    }
  }
}

// On the host: the problem without `out`, with at most `rows` rows in a stage of the tokens of D channels.
Attention attention(const NeighborhoodAttention&, int rows, int D);
Map map_of(const Tokens&, std::int64_t dim);
// The blocks of a launch, one for each tile and head.
std::int64_t blocks(const NeighborhoodAttention&);

}  // namespace cuda
}  // namespace inr
