// The backward of neighborhood_attention in bfloat16 and float16 with mma.sync, for sm_80 and later; up to 64 channels.
//
// The weights are computed again from the forward's log-sum-exp. `query_backward` takes the forward's tiles and reads
// their keys and values twice: for delta, the sum of weights times their gradients, and for the gradients of the query
// and of the bias. `key_value_backward` takes tiles of keys and reads the queries whose windows contain them. No kernel
// uses atomics.
#include "cuda/launch.cuh"
#include "cuda/neighborhood_attention.cuh"

namespace inr {
namespace cuda {
namespace {

constexpr int pitch = 18;  // floats of a row of 16 in shared memory, so that neither rows nor diagonals share banks

struct Backward {
  const float *lse, *grad_lse;  // [batch, height, width, heads], like delta
  float* delta;                 // the sum of weights times their gradients, minus grad_lse
  float* shares;                // [tiles, heads, offsets] or nullptr: the bias gradient of each tile
  Map grad, query, key, value;  // the gradients of the output, and of the inputs; data == nullptr: not computed
};

// The gradients of one head's bias that one warp sums in shared memory.
struct Offsets {
  int height, width;  // 2 y.kernel - 1, 2 x.kernel - 1
  float *sums;        // [height, width]
  float *tile;        // [16 queries, pitch]

  __device__ __forceinline__ Offsets(const Attention& p, float* memory, int warp)
      : height(2 * p.y.kernel - 1), width(2 * p.x.kernel - 1), sums(memory + warp * (height * width + 16 * pitch)),
        tile(sums + height * width) {}
  // Adds gradients of the scores of a row of 16 keys from `column` on, in the layout of products; zeros outside the
  // windows. A lane adds the elements of one diagonal, which have the same offset.
  __device__ __forceinline__ void add(const Tile& t, const Queries& queries, int key, int column,
                                      const float (&gradients)[2][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      tile[(lane / 4 + i / 2 % 2 * 8) * pitch + Queries::column_of(i / 4 * 2 + i % 2)] = gradients[i / 4][i % 4];
    __syncwarp();
    const int diagonal = lane - (side - 1), x = column - t.x + diagonal + width / 2;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int y = key - (queries.y + q) + height / 2;
      if (lane >= side - 1 + columns || x < 0 || x >= width || y < 0 || y >= height) continue;
      float sum = 0;
#pragma unroll
      for (int g = 0; g < side; ++g)
        if (g + diagonal >= 0 && g + diagonal < columns) sum += tile[(8 * q + g) * pitch + g + diagonal];
      sums[y * width + x] += sum;
    }
    __syncwarp();  // the tile has been read
  }
};

template <Type type, int D>
__global__ void __launch_bounds__(threads, 96 / D) query_backward(const Attention p, const Backward b) {
  const Tile tile(p);
  const int warp = threadIdx.x / 32, stage_size = p.stage_rows * columns * (D / 8);
  uint4* keys = reinterpret_cast<uint4*>(shared_memory());
  uint4* values = keys + stage_size;
  float* of_bias = reinterpret_cast<float*>(values + stage_size);
  Offsets offsets(p, of_bias, warp);
  const int count_offsets = offsets.height * offsets.width;
  const std::int64_t share = std::int64_t(blockIdx.x) * count_offsets;
  if (tile.empty()) {
    for (int i = threadIdx.x; b.shares && i < count_offsets; i += threads) b.shares[share + i] = 0;
    return;
  }
  for (int i = threadIdx.x % 32; b.shares && i < count_offsets; i += 32) offsets.sums[i] = 0;

  const Queries queries(p, tile);
  unsigned query[D / 16][4], grad[D / 16][4];
  load_rows<D>(p, tile, queries, p.query, query);
  load_rows<D>(p, tile, queries, b.grad, grad);
  float lse[2], delta[2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const std::int64_t at = queries.live[q] ? queries.index(p, tile, q) : 0;
    lse[q] = queries.live[q] ? b.lse[at] * log2_e : 0;
    delta[q] = queries.live[q] && threadIdx.x % 4 == 0 ? -b.grad_lse[at] : 0;
  }

  float sums[D / 8][4] = {};
  const Range rows = tile.key_rows(p.y), all_columns = tile.key_columns(p.x), mine = queries.rows();
  const bool one_stage = rows.end - rows.begin <= p.stage_rows && all_columns.end - all_columns.begin <= columns;
  const int passes = b.query.data || b.shares ? 2 : 1;  // for delta, and for the gradients
  for (int pass = 0; pass < passes; ++pass) {
    for (int row = rows.begin; row < rows.end; row += p.stage_rows)
      for (int column = all_columns.begin; column < all_columns.end; column += columns) {
        const int count = min(p.stage_rows, rows.end - row);
        if (pass == 0 || !one_stage) {
          __syncthreads();  // all warps have read the stage before
          copy_stage<D>(p, tile, p.key, row, column, count, all_columns.end, keys);
          copy_stage<D>(p, tile, p.value, row, column, count, all_columns.end, values);
          commit_copies();
          wait_for_copies<0>();
          __syncthreads();
        }
        float masked[4];
        queries.mask_columns(column, masked);
        const int last = min(row + count, mine.end);
        for (int key = max(row, mine.begin); key < last; ++key) {
          const int token = (key - row) * columns;
          float weights[2][4], gradients[2][4];
          multiply_transposed<type, D>(query, keys, token, weights);
          queries.to_scores(p, key, column, queries.seen_y, masked, weights);
          multiply_transposed<type, D>(grad, values, token, gradients);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int q = i / 2 % 2;
            const float weight = exp2_fast(weights[i / 4][i % 4] - lse[q]);
            float& gradient = gradients[i / 4][i % 4];
            if (pass == 0) delta[q] = fmaf(weight, gradient, delta[q]);
            gradient = weight * (gradient - delta[q]);
          }
          if (pass == 0) continue;
          multiply<type, D>(gradients, keys, token, sums);
          if (b.shares) offsets.add(tile, queries, key, column, gradients);
        }
      }
    if (pass > 0) break;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      delta[q] += __shfl_xor_sync(~0u, delta[q], 1);
      delta[q] += __shfl_xor_sync(~0u, delta[q], 2);
      if (queries.live[q] && threadIdx.x % 4 == 0) b.delta[queries.index(p, tile, q)] = delta[q];
    }
  }
#pragma unroll
  for (int q = 0; q < 2; ++q)
    if (b.query.data && queries.live[q]) store_row<type, D>(p, tile, queries, q, sums, p.scale * ln_2, b.query);
  if (!b.shares) return;
  __syncthreads();  // the sums of all warps are complete
  for (int i = threadIdx.x; i < count_offsets; i += threads) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += Offsets(p, of_bias, w).sums[i];
    b.shares[share + i] = sum;
  }
}

// The inverse of the window rule: the queries that see any of the keys first ... last of a class of n.
__device__ __forceinline__ Range queries_of_keys(const Side& a, int first, int last, int n) {
  Range r = {first, last + 1};
  while (r.begin > 0 && window(a, r.begin - 1, n).end > first) --r.begin;
  while (r.end < n && window(a, r.end, n).begin <= last) ++r.end;
  return r;
}

template <Type type, int D>
__global__ void __launch_bounds__(threads, 96 / D) key_value_backward(const Attention p, const Backward b) {
  const Tile tile(p);
  if (tile.empty()) return;
  const int stage_tokens = p.stage_rows * columns;
  uint4* queries = reinterpret_cast<uint4*>(shared_memory());
  uint4* grads = queries + stage_tokens * (D / 8);
  float* lse = reinterpret_cast<float*>(grads + stage_tokens * (D / 8));  // of the stage's queries, in units of log2(e)
  float* delta = lse + stage_tokens;

  const Pair keys(tile);
  unsigned key[D / 16][4], value[D / 16][4];
  load_rows<D>(p, tile, keys, p.key, key);
  load_rows<D>(p, tile, keys, p.value, value);
  float d_key[D / 8][4] = {}, d_value[D / 8][4] = {};
  const Range rows = queries_of_keys(p.y, tile.y, min(tile.y + side, tile.rows) - 1, tile.rows);
  const Range all_columns = queries_of_keys(p.x, tile.x, min(tile.x + side, tile.columns) - 1, tile.columns);
  const Range mine = keys.y < tile.rows
                         ? queries_of_keys(p.y, keys.y, min(keys.y + 1, tile.rows - 1), tile.rows)
                         : Range{0, 0};
  const std::int64_t first_bias = std::int64_t(tile.head) * (2 * p.y.kernel - 1) + p.y.kernel - 1 + keys.y;
  const std::int64_t bias = first_bias * (2 * p.x.kernel - 1) + p.x.kernel - 1 + keys.x;  // of the query at (0, 0)
  for (int row = rows.begin; row < rows.end; row += p.stage_rows)
    for (int column = all_columns.begin; column < all_columns.end; column += columns) {
      const int count = min(p.stage_rows, rows.end - row);
      __syncthreads();  // all warps have read the stage before
      copy_stage<D>(p, tile, p.query, row, column, count, all_columns.end, queries);
      copy_stage<D>(p, tile, b.grad, row, column, count, all_columns.end, grads);
      commit_copies();
      for (int i = threadIdx.x; i < count * columns; i += threads) {
        const int at_y = tile.residue_y + (row + i / columns) * p.y.dilation;
        const int at_x = tile.residue_x + (column + i % columns) * p.x.dilation;
        const std::int64_t at = ((tile.image * p.y.length + at_y) * p.x.length + at_x) * p.heads + tile.head;
        const bool exists = column + i % columns < all_columns.end;
        lse[i] = exists ? b.lse[at] * log2_e : 0;
        delta[i] = exists ? b.delta[at] : 0;
      }
      wait_for_copies<0>();
      __syncthreads();

      float masked[4];  // -infinity for queries that do not see this lane's column, else 0
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int x = column + Queries::column_of(i);
        const bool sees = x < tile.columns && window(p.x, x, tile.columns).contains(keys.x);
        masked[i] = sees ? 0 : -INFINITY;
      }
      const int last = min(row + count, mine.end);
      for (int from = max(row, mine.begin); from < last; ++from) {
        const int token = (from - row) * columns;
        const Range seen = window(p.y, from, tile.rows);
        float weights[2][4], gradients[2][4];
        multiply_transposed<type, D>(key, queries, token, weights);
        multiply_transposed<type, D>(value, grads, token, gradients);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int of = i / 4 * 2 + i % 2, q = i / 2 % 2, at = token + Queries::column_of(of);
          const float mask = keys.live[q] && seen.contains(keys.y + q) ? masked[of] : -INFINITY;
          float& weight = weights[i / 4][i % 4];
          weight = fmaf(weight, p.scale, mask);
          if (p.bias && mask == 0) {
            const int steps = (q - from) * (2 * p.x.kernel - 1) - column - Queries::column_of(of);
            weight = fmaf(p.bias[bias + steps], log2_e, weight);
          }
          weight = exp2_fast(weight - lse[at]);
          float& gradient = gradients[i / 4][i % 4];
          gradient = weight * (gradient - delta[at]);
        }
        multiply<type, D>(weights, grads, token, d_value);
        multiply<type, D>(gradients, queries, token, d_key);
      }
    }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (keys.live[i]) {
      store_row<type, D>(p, tile, keys, i, d_key, p.scale * ln_2, b.key);
      store_row<type, D>(p, tile, keys, i, d_value, 1, b.value);
    }
}

template <Type type, int D>
Status backward(const NeighborhoodAttention& p, const Backward& b, void* stream) {
  const dim3 grid{unsigned(blocks(p))};
  const auto stage = [](const Attention& a, int of_token) {  // bytes of a stage with some more of each token
    return std::size_t(a.stage_rows) * columns * (2 * (D / 8) * sizeof(uint4) + of_token);
  };
  const Attention by_query = attention(p, int(p.y.kernel + p.y.stride) + side - 2, D);
  const std::size_t offsets = std::size_t((2 * p.y.kernel - 1) * (2 * p.x.kernel - 1));
  const std::size_t of_bias = b.shares ? warps * (offsets + 16 * pitch) * sizeof(float) : 0;
  const Status first =
      launch(query_backward<type, D>, grid, threads, stage(by_query, 0) + of_bias, stream, by_query, b);
  if (first != Status::ok || !b.key.data) return first;
  // A query sees keys that are less than a kernel away.
  const Attention by_key = attention(p, side + 2 * (int(p.y.kernel) - 1), D);
  return launch(key_value_backward<type, D>, grid, threads, stage(by_key, 2 * sizeof(float)), stream, by_key, b);
}

template <Type type>
Status backward(const NeighborhoodAttention& p, const Backward& b, void* stream) {
  return (p.dim <= 32 ? backward<type, 32> : backward<type, 64>)(p, b, stream);
}

}  // namespace
}  // namespace cuda

std::int64_t neighborhood_attention_tiles_cuda(const NeighborhoodAttention& p) { return cuda::blocks(p) / p.heads; }

Status neighborhood_attention_backward_cuda(Type type, const NeighborhoodAttention& p, const void* lse,
                                            const Tokens& grad_out, const void* grad_lse,
                                            const NeighborhoodAttentionGradients& gradients, void* delta,
                                            void* stream) {
  const auto map = [&](const Tokens& tokens) { return cuda::map_of(tokens, p.dim); };
  const cuda::Backward b = {static_cast<const float*>(lse), static_cast<const float*>(grad_lse),
                            static_cast<float*>(delta), static_cast<float*>(gradients.bias), map(grad_out),
                            map(gradients.query), map(gradients.key), map(gradients.value)};
  if (type == Type::bfloat16) return cuda::backward<Type::bfloat16>(p, b, stream);
  if (type == Type::float16) return cuda::backward<Type::float16>(p, b, stream);
  return Status::unsupported_type;
}

}  // namespace inr
