// The forward of local_implicit in bfloat16 and float16 with mma.sync, for sm_80 and later.
//
// A warp processes 16 or 32 rows through all layers with their hidden state in registers: the result of a product is
// the left fragment of the next product. The eight warps of a block share the weights, which are streamed from the L2
// cache through three slots of shared memory, in the order and the layout in which they are used.
#include "cuda/launch.cuh"
#include "cuda/local_implicit_layers.cuh"
#include "cuda/local_implicit_weights.cuh"

namespace inr {
namespace cuda {
namespace {

constexpr int warps = 8, threads = 32 * warps;

// How a kernel divides its work: M tiles of 16 rows per warp. If shared memory can hold the next hidden state of two
// tiles, each weight that is read from it is used for twice as many rows; fewer registers are then left for the sums.
template <int W, int M>
struct Tiling {
  static constexpr int block_rows = warps * 16 * M;
  static constexpr int slots = M == 1 ? 3 : 2;
  static constexpr int part = M == 1 ? 64 : 32, tiles = part / 8;    // outputs that are computed at a time
  static constexpr int slice = stage * 8 / part;                     // inputs in a stage
  static constexpr int next_state = M == 1 ? 0 : warps * M * W / 16 * 32;  // uint4 of shared memory
  static constexpr std::size_t shared = (slots * stage + next_state) * sizeof(uint4);
};
static_assert(Tiling<256, 1>::shared <= 48 << 10, "more than the default limit of every GPU");
static_assert(Tiling<256, 2>::shared <= 163 << 10, "more than a block may use on an A100");

// Streams the stages of the weights through a ring in shared memory.
template <int slots>
struct WeightStream {
  const uint4* from;  // [left, stage]
  uint4* ring;        // [slots, stage]
  int left;           // stages to prefetch
  int filling = 0, reading = 0;

  __device__ __forceinline__ WeightStream(const uint4* from, int count)
      : from(from), ring(reinterpret_cast<uint4*>(shared_memory())), left(count) {
    for (int i = 0; i + 1 < slots; ++i) prefetch();
  }
  __device__ __forceinline__ void prefetch() {
    if (left > 0) {
      uint4* to = ring + filling * stage;
#pragma unroll 1  // a separate basic block: interleaved with the products, the copies would cause spills
      for (int i = 0; i < stage; i += threads) copy_async(to + i + threadIdx.x, from + i + threadIdx.x);
      from += stage, --left;
    }
    commit_copies();  // also if empty, because next() counts the groups
    filling = filling + 1 < slots ? filling + 1 : 0;
  }
  // The next stage, valid until the next call: [stage].
  __device__ __forceinline__ const uint4* next() {
    wait_for_copies<slots - 2>();
    __syncthreads();  // all threads' copies have arrived, and no thread reads the slot that is filled next
    prefetch();
    const uint4* ready = ring + reading * stage;
    reading = reading + 1 < slots ? reading + 1 : 0;
    return ready;
  }
};

template <Type type, int W, bool First, int M>
__global__ void __launch_bounds__(threads, 1) decode(const Decoder p) {
  using F = Tiling<W, M>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  WeightStream<F::slots> weights(p.stages, stages<W>(p.hidden, p.outputs));
  const int per_query = !First && p.queries.ensemble ? 4 : 1;
  const std::int64_t first = (std::int64_t(blockIdx.x) * warps + threadIdx.x / 32) * (16 * M) / per_query;

  // The left fragments (16 channels each) of rows g and g + 8 of M tiles: channels 8 t ... 8 t + 7 of every 32.
  unsigned state[M][W / 16][4];
  Row<First> rows[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Row<First> mine = locate<First>(p.queries, first, 16 * m + lane % 16);
    rows[m][0] = mine.of_lane(g), rows[m][1] = mine.of_lane(g + 8);
    first_layer<type, W, 4 / M>(p, rows[m], t, state[m]);
  }

  // The next state until the layer is finished, in registers, or in shared memory that only this lane accesses.
  uint4 next[M == 1 ? W / 16 : 1];
  uint4* next_state = reinterpret_cast<uint4*>(shared_memory()) + F::slots * stage + threadIdx.x;
  const auto next_fragment = [&](int m, int k) -> uint4& {
    if constexpr (M == 1) return next[k];
    return next_state[(m * (W / 16) + k) * threads];
  };
  const uint4* tile;
  for (int layer = 0; layer < p.hidden; ++layer) {
#pragma unroll
    for (int part = 0; part < W; part += F::part) {
      float sum[M][F::tiles][4];
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < F::tiles; n += 4) start_sum(p, rows[m], layer, part + 8 * n + 8 * t, sum[m] + n);
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
          next_fragment(m, part / 16 + n / 2) = {pack_relu<type>(low[0], low[1]), pack_relu<type>(low[2], low[3]),
                                         pack_relu<type>(high[0], high[1]), pack_relu<type>(high[2], high[3])};
        }
    }
#pragma unroll
    for (int i = 0; i < M * W / 16; ++i) {
      const uint4 v = next_fragment(i % M, i / M);
      unsigned(&to)[4] = state[i % M][i / M];
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
  }

  constexpr int last_part = stage * 8 / W;
  for (int start = 0; start < p.outputs; start += last_part) {
    tile = weights.next() + lane;
    for (int o = start; o < min(start + last_part, p.outputs); o += 8, tile += W) {
#pragma unroll
      for (int m = 0; m < M; ++m) last_layer<type, W>(p, state[m], rows[m], first + 16 * m / per_query, o, tile);
    }
  }
}

template <Type type, int W, bool First, int M>
Status forward(const LocalImplicit& problem, void* out, void* workspace, void* stream) {
  using F = Tiling<W, M>;
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
  const bool wide = padded_width(p) == 256, two = shared >= int(Tiling<256, 2>::shared);
  const auto run = p.ensemble_first ? (wide ? forward<type, 256, true, 1> : forward<type, 128, true, 1>)
                   : !wide          ? forward<type, 128, false, 1>
                   : two            ? forward<type, 256, false, 2>
                                    : forward<type, 256, false, 1>;
  return run(p, out, workspace, stream);
}

}  // namespace
}  // namespace cuda

Status local_implicit_forward_cuda(Type type, const LocalImplicit& p, bool wgmma, void* out, void* workspace,
                                   void* stream) {
  if (type != Type::bfloat16 && type != Type::float16) return Status::unsupported_type;
  if (wgmma) return cuda::forward_wgmma(type, p, out, workspace, stream);
  if (type == Type::bfloat16) return cuda::forward<Type::bfloat16>(p, out, workspace, stream);
  return cuda::forward<Type::float16>(p, out, workspace, stream);
}

}  // namespace inr
