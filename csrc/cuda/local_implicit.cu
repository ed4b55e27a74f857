// local_implicit's forward in half precision with mma.sync, for sm_80 and later.
//
// A warp takes 16 or 32 rows through all layers, their hidden state in its registers: a product's result is the next
// product's left fragment. The eight warps of a block share the weights, which stream from the L2 cache through
// three slots of shared memory, in the order and the layout in which they are used.
#include "cuda/launch.cuh"
#include "cuda/local_implicit.cuh"
#include "cuda/local_implicit_weights.cuh"

namespace inr {
namespace cuda {
namespace {

constexpr int warps = 8, threads = 32 * warps;

// How a kernel divides its work: M tiles of 16 rows a warp. Where shared memory has room for the hidden state of two,
// each weight that is read from it serves twice as many rows, whose registers leave room for narrower sums alone.
template <int W, int M>
struct Form {
  static constexpr int block_rows = warps * 16 * M;
  static constexpr int slots = M == 1 ? 3 : 2;
  static constexpr int part = M == 1 ? 64 : 32, tiles = part / 8;    // outputs that are summed up at a time
  static constexpr int slice = stage * 8 / part;                     // inputs in a stage
  static constexpr int waiting = M == 1 ? 0 : warps * M * W / 16 * 32;  // uint4 of shared memory
  static constexpr std::size_t shared = (slots * stage + waiting) * sizeof(uint4);
};
static_assert(Form<256, 1>::shared <= 48 << 10, "more than every chip gives unasked");
static_assert(Form<256, 2>::shared <= 163 << 10, "more than an A100 has");

// The stages of the weights, one after the other.
template <int slots>
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

template <Type type, int W, bool First, int M>
__global__ void __launch_bounds__(threads, 1) decode(const Decoder p) {
  using F = Form<W, M>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Stream<F::slots> weights(p.stages, stages<W>(p.hidden, p.outputs));
  const int per_query = !First && p.queries.ensemble ? 4 : 1;
  const std::int64_t first = (std::int64_t(blockIdx.x) * warps + threadIdx.x / 32) * (16 * M) / per_query;

  // The left fragments of 16 channels each, of rows g and g + 8 of M tiles: of every 32 channels 8 t ... 8 t + 7.
  unsigned state[M][W / 16][4];
  Row<First> rows[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Row<First> mine = locate<First>(p.queries, first, 16 * m + lane % 16);
    rows[m][0] = mine.of_lane(g), rows[m][1] = mine.of_lane(g + 8);
#pragma unroll
    for (int k = 0; k < W / 32; ++k) {
      const uint4 a = first_layer<type, W>(p, rows[m][0], k, t), b = first_layer<type, W>(p, rows[m][1], k, t);
      unsigned(&low)[4] = state[m][2 * k], (&high)[4] = state[m][2 * k + 1];
      low[0] = a.x, low[1] = b.x, low[2] = a.y, low[3] = b.y;
      high[0] = a.z, high[1] = b.z, high[2] = a.w, high[3] = b.w;
    }
  }

  // The next state, until the layer is done: in registers, or in shared memory that this lane alone touches.
  uint4 next[M == 1 ? W / 16 : 1];
  uint4* waiting = reinterpret_cast<uint4*>(shared_memory()) + F::slots * stage + threadIdx.x;
  const auto place = [&](int m, int k) -> uint4& {
    if constexpr (M == 1) return next[k];
    return waiting[(m * (W / 16) + k) * threads];
  };
  const uint4* tile;
  for (int layer = 0; layer < p.hidden; ++layer) {
    const float* bias = p.bias + layer * p.padded + 8 * t;
    const float* late_cell = First && layer == 0 && p.late_cell ? p.late_cell + 8 * t : nullptr;
#pragma unroll
    for (int part = 0; part < W; part += F::part) {
      float sum[M][F::tiles][4];
#pragma unroll
      for (int n = 0; n < F::tiles; n += 4) {
        Eight start[M][2];
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) start[i / 2][i % 2] = Eight::load(bias + part + 8 * n);
        if (First && late_cell) {
          const Eight y = Eight::load(late_cell + part + 8 * n), x = Eight::load(late_cell + p.padded + part + 8 * n);
#pragma unroll
          for (int i = 0; i < 2 * M; ++i) {
            start[i / 2][i % 2].add(rows[i / 2][i % 2].cell_y, y);
            start[i / 2][i % 2].add(rows[i / 2][i % 2].cell_x, x);
          }
        }
#pragma unroll
        for (int i = 0; i < 16 * M; ++i) {
          const int m = i / 16, r = i / 8 % 2, j = i % 8;
          sum[m][n + j / 2][2 * r + j % 2] = start[m][r].v[j];
        }
      }
#pragma unroll
      for (int k = 0; k < W; k += 32) {
        if (k % F::slice == 0) tile = weights.next() + lane;
#pragma unroll
        for (int n = 0; n < F::tiles; ++n) {
          const uint4 b = tile[(k % F::slice / 32 * F::tiles + n) * 32];
#pragma unroll
          for (int m = 0; m < M; ++m) mma<type>(sum[m][n], state[m][k / 16], b.x, b.y);
#pragma unroll
          for (int m = 0; m < M; ++m) mma<type>(sum[m][n], state[m][k / 16 + 1], b.z, b.w);
        }
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < F::tiles; n += 2) {
          const float(&low)[4] = sum[m][n], (&high)[4] = sum[m][n + 1];
          place(m, part / 16 + n / 2) = {pack_relu<type>(low[0], low[1]), pack_relu<type>(low[2], low[3]),
                                         pack_relu<type>(high[0], high[1]), pack_relu<type>(high[2], high[3])};
        }
    }
#pragma unroll
    for (int i = 0; i < M * W / 16; ++i) {
      const uint4 v = place(i % M, i / M);
      unsigned(&to)[4] = state[i % M][i / M];
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
  }

  constexpr int last_part = stage * 8 / W;
  for (int start = 0; start < p.outputs; start += last_part) {
    tile = weights.next() + lane;
    for (int o = start; o < min(start + last_part, p.outputs); o += 8, tile += W) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float sum[4][4] = {};  // four chains: products in a chain wait for each other
#pragma unroll
        for (int k = 0; k < W / 32; ++k) {
          const uint4 b = tile[k * 32];
          mma<type>(sum[k % 2], state[m][2 * k], b.x, b.y);
          mma<type>(sum[2 + k % 2], state[m][2 * k + 1], b.z, b.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Row<First>& row = rows[m][i / 2];
          float y = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
          if (per_query == 4) {  // the last Linear commutes with the ensemble
            y *= row.weight[0];
            y += __shfl_xor_sync(~0u, y, 4);
            y += __shfl_xor_sync(~0u, y, 8);
          }
          const int n = o + 2 * t + i % 2, r = 16 * m + g + i / 2 * 8;
          const std::int64_t query = first + r / per_query;
          if (n >= p.outputs || query >= p.queries.count || r % per_query) continue;
          y += p.bias[p.hidden * p.padded + n];
          if (First && p.late_cell && p.hidden == 0) {
            y = fmaf(row.cell_y, p.late_cell[n], y);
            y = fmaf(row.cell_x, p.late_cell[p.padded + n], y);
          }
          p.out[query * p.outputs + n] = std::uint16_t(pack<type>(y, 0));
        }
        __syncwarp();  // products take all lanes together
      }
    }
  }
}

template <Type type, int W, bool First, int M>
Status forward(const LocalImplicit& problem, void* out, void* workspace, void* stream) {
  using F = Form<W, M>;
  const Status packed = pack(type, problem, F::part, workspace, stream);
  if (packed != Status::ok) return packed;
  const std::int64_t rows = problem.queries() * (First ? 1 : problem.neighbours());
  const dim3 blocks(unsigned((rows + F::block_rows - 1) / F::block_rows));
  return launch(decode<type, W, First, M>, blocks, threads, F::shared, stream, decoder(problem, out, workspace));
}

template <Type type>
Status forward(const LocalImplicit& p, void* out, void* workspace, void* stream) {
  int shared = 0;
  const Status known = shared_limit(shared);
  if (known != Status::ok) return known;
  const bool wide = padded_width(p) == 256, two = shared >= int(Form<256, 2>::shared);
  const auto run = p.ensemble_first ? (wide ? forward<type, 256, true, 1> : forward<type, 128, true, 1>)
                   : !wide          ? forward<type, 128, false, 1>
                   : two            ? forward<type, 256, false, 2>
                                    : forward<type, 256, false, 1>;
  return run(p, out, workspace, stream);
}

}  // namespace
}  // namespace cuda

Status local_implicit_forward_cuda(Type type, const LocalImplicit& p, void* out, void* workspace, void* stream) {
  if (type == Type::bfloat16) return cuda::forward<Type::bfloat16>(p, out, workspace, stream);
  if (type == Type::float16) return cuda::forward<Type::float16>(p, out, workspace, stream);
  return Status::unsupported_type;
}

}  // namespace inr
