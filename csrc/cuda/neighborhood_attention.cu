// The forward of neighborhood_attention in bfloat16 and float16 with mma.sync, for sm_80 and later.
//
// The keys and the values of the rectangle that the windows of a block's 8 x 8 queries cover are copied to shared
// memory, a stage of some rows of 16 columns at a time. Each of the four warps has 2 x 8 of the queries, the 16 rows of
// its products, and goes over the rows of keys in its own windows, two at a time, with an online softmax. With K = 7
// these are 8 rows of 16 columns: 2.6 times the products that are needed.
#include "cuda/launch.cuh"
#include "cuda/neighborhood_attention.cuh"

namespace inr {
namespace cuda {
namespace {

constexpr int group = 2;  // rows of keys that share a step of the online softmax

template <Type type, int D>
__global__ void __launch_bounds__(threads, 128 / D) attend(const Attention p, const Map out, float* lse) {
  const Tile tile(p);
  if (tile.empty()) return;
  uint4* keys = reinterpret_cast<uint4*>(shared_memory());
  uint4* values = keys + p.stage_rows * columns * (D / 8);
  const Queries queries(p, tile);
  unsigned query[D / 16][4];
  load_rows<D>(p, tile, queries, p.query, query);

  float sums[D / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const Range rows = tile.key_rows(p.y), all_columns = tile.key_columns(p.x), mine = queries.rows();
  for (int row = rows.begin; row < rows.end; row += p.stage_rows)
    for (int column = all_columns.begin; column < all_columns.end; column += columns) {
      const int count = min(p.stage_rows, rows.end - row);
      __syncthreads();  // all warps have read the stage before
      copy_stage<D>(p, tile, p.key, row, column, count, all_columns.end, keys);
      copy_stage<D>(p, tile, p.value, row, column, count, all_columns.end, values);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();

      float masked[4];
      queries.mask_columns(column, masked);
      const int last = min(row + count, mine.end);
      const Range seen[2] = {queries.seen_y[0].until(last), queries.seen_y[1].until(last)};
      for (int first = max(row, mine.begin); first < last; first += group) {
        float scores[group][2][4];
#pragma unroll
        for (int j = 0; j < group; ++j) {
          // Rows beyond the last are masked copies of it, which is quicker than branches around the products.
          multiply_transposed<type, D>(query, keys, (min(first + j, last - 1) - row) * columns, scores[j]);
          queries.to_scores(p, first + j, column, seen, masked, scores[j]);
        }
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          float most = largest[q];
#pragma unroll
          for (int i = 0; i < 4 * group; ++i) most = fmaxf(most, scores[i / 4][i / 2 % 2][2 * q + i % 2]);
          most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
          most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
          const float shift = most == -INFINITY ? 0.f : most, rescale = exp2_fast(largest[q] - shift);
          largest[q] = most;
          total[q] *= rescale;
#pragma unroll
          for (int i = 0; i < 4 * group; ++i) {
            float& score = scores[i / 4][i / 2 % 2][2 * q + i % 2];
            score = exp2_fast(score - shift);
            total[q] += score;
          }
#pragma unroll
          for (int n = 0; n < D / 8; ++n) sums[n][2 * q] *= rescale, sums[n][2 * q + 1] *= rescale;
        }
#pragma unroll
        for (int j = 0; j < group; ++j)
          multiply<type, D>(scores[j], values, (min(first + j, last - 1) - row) * columns, sums);
      }
    }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = total[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (!queries.live[i]) continue;
    store_row<type, D>(p, tile, queries, i, sums, 1 / sum, out);
    if (threadIdx.x % 4 == 0) lse[queries.index(p, tile, i)] = (largest[i] + log2f(sum)) * ln_2;
  }
}

Side side_of(const Axis& a) {
  const int longest = int((a.length + a.dilation - 1) / a.dilation);
  return {int(a.length), int(a.kernel), int(a.dilation), int(a.stride), (longest + side - 1) / side, a.causal};
}

template <Type type, int D>
Status forward(const NeighborhoodAttention& p, const Tokens& out, void* lse, void* stream) {
  // So many rows of keys are in the windows of eight queries, at most.
  const Attention a = attention(p, int(p.y.kernel + p.y.stride) + side - 2, D);
  const std::size_t shared = std::size_t(2) * a.stage_rows * columns * (D / 8) * sizeof(uint4);
  return launch(attend<type, D>, dim3(unsigned(blocks(p))), threads, shared, stream, a, map_of(out, p.dim),
                static_cast<float*>(lse));
}

template <Type type>
Status forward(const NeighborhoodAttention& p, const Tokens& out, void* lse, void* stream) {
  const auto run = p.dim <= 32 ? forward<type, 32> : p.dim <= 64 ? forward<type, 64> : forward<type, 128>;
  return run(p, out, lse, stream);
}

}  // namespace

Map map_of(const Tokens& tokens, std::int64_t dim) {
  const std::int64_t* s = tokens.strides;  // of batch, depth, height, width, heads
  const std::int64_t all = dim | s[0] | s[2] | s[3] | s[4];
  const bool aligned = all % 8 == 0 && reinterpret_cast<std::uintptr_t>(tokens.data) % 16 == 0;
  return {static_cast<std::uint16_t*>(const_cast<void*>(tokens.data)), s[0], s[2], s[3], s[4], aligned};
}

Attention attention(const NeighborhoodAttention& p, int rows, int D) {
  const Side y = side_of(p.y), x = side_of(p.x);
  const int longest = y.tiles * side, most = stage_chunks / (columns * D / 8);
  rows = rows < longest ? rows : longest;
  const float scale = float(p.scale * 1.4426950408889634);
  return {y, x, int(p.heads), int(p.dim), rows < most ? rows : most, scale, static_cast<const float*>(p.bias),
          map_of(p.query, p.dim), map_of(p.key, p.dim), map_of(p.value, p.dim)};
}

std::int64_t blocks(const NeighborhoodAttention& p) {
  const Side y = side_of(p.y), x = side_of(p.x);
  return p.batch * p.heads * y.tiles * y.dilation * x.tiles * x.dilation;
}

}  // namespace cuda

Status neighborhood_attention_forward_cuda(Type type, const NeighborhoodAttention& p, const Tokens& out, void* lse,
                                           void* stream) {
  if (type == Type::bfloat16) return cuda::forward<Type::bfloat16>(p, out, lse, stream);
  if (type == Type::float16) return cuda::forward<Type::float16>(p, out, lse, stream);
  return Status::unsupported_type;
}

}  // namespace inr
