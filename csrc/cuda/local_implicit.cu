// local_implicit's forward in half precision with mma.sync, for sm_80 and later.
//
// A warp takes 16 rows through all layers, their hidden state in its registers: a product's result is the next
// product's left fragment. The eight warps of a block share the weights, which stream from the L2 cache through
// three slots of shared memory, in the order and the layout in which they are used.
#include "cuda/launch.cuh"
#include "cuda/local_implicit.cuh"
#include "cuda/local_implicit_weights.cuh"

namespace inr {
namespace cuda {
namespace {

constexpr int warps = 8, threads = 32 * warps, warp_rows = 16, block_rows = warps * warp_rows, slots = 3;

// The stages of the weights, one after the other.
struct Stream {
  const uint4* from;
  uint4* ring;  // [slots, stage]
  int left;     // to ask for
  int filling = 0, using_ = 0;

  __device__ __forceinline__ Stream(const uint4* from, int count)
      : from(from), ring(reinterpret_cast<uint4*>(shared_memory())), left(count) {
    for (int i = 0; i + 1 < slots; ++i) ask();
  }
  __device__ __forceinline__ void ask() {
    if (left > 0) {
      uint4* to = ring + filling * stage;
#pragma unroll 1  // a block of its own: scheduled among the products it would spill
      for (int i = 0; i < stage; i += threads) copy_async(to + i + threadIdx.x, from + i + threadIdx.x);
      from += stage, --left;
    }
    commit_copies();  // an empty group, too: they are counted
    filling = filling + 1 < slots ? filling + 1 : 0;
  }
  // The next stage, which stays until the call after this one.
  __device__ __forceinline__ const uint4* next() {
    wait_for_copies<slots - 2>();
    __syncthreads();  // everyone's share has come, and nobody reads the slot that is filled next
    ask();
    const uint4* ready = ring + using_ * stage;
    using_ = using_ + 1 < slots ? using_ + 1 : 0;
    return ready;
  }
};

// Two neighbouring left fragments of 16 channels each: [rows g and g + 8, channels 8 t ... 8 t + 7 of 32].
__device__ __forceinline__ void set_fragments(unsigned (&low)[4], unsigned (&high)[4], const uint4& a, const uint4& b) {
  low[0] = a.x, low[1] = b.x, low[2] = a.y, low[3] = b.y;
  high[0] = a.z, high[1] = b.z, high[2] = a.w, high[3] = b.w;
}

template <Type type, int W, bool First>
__global__ void __launch_bounds__(threads, 1) decode(const Decoder p) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Stream weights(p.stages, stages<W>(p.hidden, p.outputs));
  const int per_query = !First && p.queries.ensemble ? 4 : 1;
  const std::int64_t first = (std::int64_t(blockIdx.x) * block_rows + threadIdx.x / 32 * warp_rows) / per_query;
  Row<First> rows[2];
  {
    const Row<First> mine = locate<First>(p.queries, first, lane % 16);
    rows[0] = mine.of_lane(g), rows[1] = mine.of_lane(g + 8);
  }

  unsigned state[W / 16][4];
#pragma unroll
  for (int k = 0; k < W / 32; ++k)
    set_fragments(state[2 * k], state[2 * k + 1], first_layer<type, W>(p, rows[0], k, t),
                  first_layer<type, W>(p, rows[1], k, t));

  const uint4* tile;
  for (int layer = 0; layer < p.hidden; ++layer) {
    const float* bias = p.bias + layer * p.padded + 8 * t;
    const float* late_cell = First && layer == 0 && p.late_cell ? p.late_cell + 8 * t : nullptr;
    unsigned next[W / 16][4];
#pragma unroll
    for (int part = 0; part < W / stage_outputs; ++part) {
      float sum[tiles][4];
#pragma unroll
      for (int n = 0; n < tiles; n += 4) {
        const int c = stage_outputs * part + 8 * n;
        Eight start[2] = {Eight::load(bias + c), Eight::load(bias + c)};
        if (First && late_cell)
          for (int r = 0; r < 2; ++r) {
            start[r].add(rows[r].cell_y, Eight::load(late_cell + c));
            start[r].add(rows[r].cell_x, Eight::load(late_cell + p.padded + c));
          }
#pragma unroll
        for (int i = 0; i < 16; ++i) sum[n + i / 4][i % 4] = start[i % 4 / 2].v[i / 4 * 2 + i % 2];
      }
#pragma unroll
      for (int k = 0; k < W / 16; k += 2) {
        if (k % (stage_inputs / 16) == 0) tile = weights.next() + lane;
#pragma unroll
        for (int n = 0; n < tiles; ++n) {
          const uint4 b = tile[(k % (stage_inputs / 16) / 2 * tiles + n) * 32];
          mma<type>(sum[n], state[k], b.x, b.y);
          mma<type>(sum[n], state[k + 1], b.z, b.w);
        }
      }
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        next[(part * tiles + n) / 2][n % 2 * 2] = pack_relu<type>(sum[n][0], sum[n][1]);
        next[(part * tiles + n) / 2][n % 2 * 2 + 1] = pack_relu<type>(sum[n][2], sum[n][3]);
      }
    }
#pragma unroll
    for (int i = 0; i < W / 4; ++i) state[i / 4][i % 4] = next[i / 4][i % 4];
  }

  constexpr int last_columns = stage * 8 / W;
  for (int start = 0; start < p.outputs; start += last_columns) {
    tile = weights.next() + lane;
    for (int o = start; o < min(start + last_columns, p.outputs); o += 8, tile += W) {
      float sum[4][4] = {};  // four chains: products in a chain wait for each other
#pragma unroll
      for (int k = 0; k < W / 32; ++k) {
        const uint4 b = tile[k * 32];
        mma<type>(sum[k % 2], state[2 * k], b.x, b.y);
        mma<type>(sum[2 + k % 2], state[2 * k + 1], b.z, b.w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float y = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
        if (per_query == 4) {  // the last Linear commutes with the ensemble
          y *= rows[i / 2].weight[0];
          y += __shfl_xor_sync(~0u, y, 4);
          y += __shfl_xor_sync(~0u, y, 8);
        }
        const int n = o + 2 * t + i % 2, row = g + i / 2 * 8;
        const std::int64_t query = first + row / per_query;
        if (n >= p.outputs || query >= p.queries.count || row % per_query) continue;
        y += p.bias[p.hidden * p.padded + n];
        if (First && p.late_cell && p.hidden == 0) {
          y = fmaf(rows[i / 2].cell_y, p.late_cell[n], y);
          y = fmaf(rows[i / 2].cell_x, p.late_cell[p.padded + n], y);
        }
        p.out[query * p.outputs + n] = std::uint16_t(pack<type>(y, 0));
      }
      __syncwarp();  // products take all lanes together
    }
  }
}

template <Type type, int W>
Status forward(const LocalImplicit& problem, void* out, void* workspace, void* stream) {
  const bool first = problem.ensemble_first;
  const std::int64_t rows = problem.queries() * (first ? 1 : problem.neighbours());
  const dim3 blocks(unsigned((rows + block_rows - 1) / block_rows));
  return launch(first ? decode<type, W, true> : decode<type, W, false>, blocks, threads,
                slots * stage * sizeof(uint4), stream, decoder(problem, out, workspace));
}

}  // namespace
}  // namespace cuda

Status local_implicit_forward_cuda(Type type, const LocalImplicit& p, void* out, void* workspace, void* stream) {
  if (type != Type::bfloat16 && type != Type::float16) return Status::unsupported_type;
  const Status packed = cuda::pack(type, p, workspace, stream);
  if (packed != Status::ok) return packed;
  const bool wide = cuda::padded_width(p) == 256;
  if (type == Type::bfloat16)
    return (wide ? cuda::forward<Type::bfloat16, 256> : cuda::forward<Type::bfloat16, 128>)(p, out, workspace, stream);
  return (wide ? cuda::forward<Type::float16, 256> : cuda::forward<Type::float16, 128>)(p, out, workspace, stream);
}

}  // namespace inr
