// The forward of local_implicit in bfloat16 and float16 with wgmma, for sm_90a and hidden widths of 129 to 256.
//
// A warpgroup processes 64 rows through all layers with their hidden state in registers, like in local_implicit.cu. Two
// warpgroups of a block share the weights, which a thread of a third one streams through a ring of slices (64 inputs of
// a layer each). Each of the two blocks of a cluster fetches half of every slice for both blocks: separately they would
// read 32 bytes per cycle each from the L2 cache, which exceeds its bandwidth. The two warpgroups alternate layer by
// layer: while one multiplies, the other one rounds, writes outputs and samples the feature map.
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/local_implicit_layers.cuh"
#include "cuda/local_implicit_weights.cuh"

namespace inr {
namespace cuda {
namespace {

constexpr int W = 256, slices = W / 64, slice_bytes = W * 128, slots = 6;
constexpr int groups = 2, warps = 4 * groups, threads = 128 * (groups + 1), blocks = 2;
constexpr int block_rows = 16 * warps, cluster_rows = blocks * block_rows;
constexpr int multiplier_registers = 232, copier_registers = 40;  // registers of a thread
static_assert(groups * multiplier_registers + copier_registers <= (groups + 1) * 168,
              "more registers than the launch allocates");

struct SharedMemory {
  char slot[slots][slice_bytes];  // aligned to 1024 bytes, for the swizzle
  Barrier full[slots], empty[slots];
  Barrier may_multiply[groups];
};
static_assert(sizeof(SharedMemory) <= 227 << 10, "more shared memory than a block may use");

// A slot of the ring, and the parity of its current phase.
struct Slot {
  int index = 0;
  unsigned parity;

  __device__ __forceinline__ explicit Slot(unsigned parity) : parity(parity) {}
  __device__ __forceinline__ void advance() {
    if (++index == slots) index = 0, parity ^= 1;
  }
};

// The tiles of `cluster_rows` rows that a cluster decodes: begin, begin + step, ... < end.
struct Tiles {
  int begin, end, step;
};

// The matrix descriptor of the inputs [16 k, 16 k + 16) of a slice: rows of 128 bytes with contiguous inputs, 128-byte
// swizzle, 8-row patterns that are contiguous in memory. slice: [W outputs][64 inputs]
__device__ __forceinline__ std::uint64_t descriptor(const char* slice, int k) {
  const unsigned start = shared_address(slice) + 32 * k;
  constexpr std::uint64_t swizzle_128 = std::uint64_t(1) << 62, stride = std::uint64_t(1024 / 16) << 32;
  return swizzle_128 | stride | 1 << 16 | (start & 0x3ffff) / 16;
}

// Copies the slices of all layers, for every tile; run by one thread.
__device__ __forceinline__ void stream_weights(const Decoder& p, SharedMemory& memory, Tiles tiles) {
  constexpr unsigned share = slice_bytes / blocks;
  const unsigned mine = cluster_rank() * share;
  Slot at(1);
  for (int tile = tiles.begin; tile < tiles.end; tile += tiles.step) {
    const char* slice = reinterpret_cast<const char*>(p.stages) + mine;
    for (int i = 0; i < p.hidden * slices; ++i, slice += slice_bytes, at.advance()) {
      wait(memory.empty[at.index], at.parity);
      arrive_expecting(memory.full[at.index], slice_bytes);
      copy_to_blocks(memory.slot[at.index] + mine, slice, share, memory.full[at.index], (1 << blocks) - 1);
    }
  }
}

// Decodes the warp's 16 rows of every tile.
template <Type type, bool First>
__device__ __forceinline__ void decode_rows(const Decoder& p, SharedMemory& memory, Tiles tiles, int warp) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = warp / 4;
  const int per_query = !First && p.queries.ensemble ? 4 : 1;
  Slot at(0);
  unsigned parity = group == 0;  // parity 1 does not wait: group 0 begins
  const auto first_query = [&](int tile) {
    return (std::int64_t(tile) * cluster_rows + int(cluster_rank()) * block_rows + warp * 16) / per_query;
  };
  const auto release = [&](int slot) {
    if (lane < blocks) arrive_remote(memory.empty[slot], lane);
  };
  Row<First> mine;
  if (!First) mine = locate<First>(p.queries, first_query(tiles.begin), lane % 16);
  for (int tile = tiles.begin; tile < tiles.end; tile += tiles.step) {
    if (First) mine = locate<First>(p.queries, first_query(tile), lane % 16);
    const Row<First> rows[2] = {mine.of_lane(g), mine.of_lane(g + 8)};
    unsigned state[W / 16][4];
    first_layer<type, W, 4>(p, rows, t, state);
#pragma unroll 1
    for (int layer = 0; layer < p.hidden; ++layer) {
      float sum[W / 8][4];
#pragma unroll
      for (int j = 0; j < W / 32; ++j) start_sum(p, rows, layer, 32 * j + 8 * t, sum + 4 * j);
      wait(memory.may_multiply[group], parity);
      parity ^= 1;
      int before = 0;
#pragma unroll
      for (int s = 0; s < slices; ++s, at.advance()) {
        wait(memory.full[at.index], at.parity);
        fence_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma<type>(sum, state[4 * s + k], descriptor(memory.slot[at.index], k));
        commit_products();
        if (s > 0) {
          wait_for_products<1>();
          release(before);
        }
        before = at.index;
      }
      if (lane == 0) arrive(memory.may_multiply[group ^ 1]);
      // Locates the next tile's row while the products are pending.
      if (!First && layer == 0) mine = locate<First>(p.queries, first_query(tile + tiles.step), lane % 16);
      wait_for_products<0>();
      release(before);
#pragma unroll
      for (int i = 0; i < W / 4; ++i) {
        const float* pair = sum[i / 2] + i % 2 * 2;
        state[i / 4][i % 4] = pack_relu<type>(pair[0], pair[1]);
      }
    }
    const std::int64_t first = first_query(tile);
    const uint4* last = p.stages + p.hidden * (W * W / 8) + lane;
    for (int o = 0; o < p.outputs; o += 8, last += W) last_layer<type, W>(p, state, rows, first, o, last);
  }
}

template <Type type, bool First>
__global__ void __launch_bounds__(threads, 1) decode(const Decoder p, int tiles) {
  SharedMemory& memory = *reinterpret_cast<SharedMemory*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int s = 0; s < slots; ++s) initialize(memory.full[s], 1), initialize(memory.empty[s], blocks * warps);
    for (int g = 0; g < groups; ++g) initialize(memory.may_multiply[g], warps / groups);
    fence_barrier_init();
  }
  cluster_barrier();
  const int warp = __shfl_sync(~0u, int(threadIdx.x / 32), 0);  // tells the compiler that it is uniform over a warp
  const Tiles mine{int(blockIdx.x / blocks), tiles, int(gridDim.x / blocks)};
  if (warp >= warps) {
    decrease_registers<copier_registers>();
    if (threadIdx.x == 32 * warps) stream_weights(p, memory, mine);
  } else {
    increase_registers<multiplier_registers>();
    decode_rows<type, First>(p, memory, mine, warp);
  }
  cluster_barrier();  // the other block may still write to this block's shared memory
}

template <Type type>
Status forward(const LocalImplicit& problem, void* out, void* workspace, void* stream) {
  const Status packed = pack(type, problem, W, workspace, stream);
  if (packed != Status::ok) return packed;
  const std::int64_t rows = problem.queries() * (problem.ensemble_first ? 1 : problem.neighbours());
  const int tiles = int((rows + cluster_rows - 1) / cluster_rows);
  int multiprocessors;
  const Status counted = count_multiprocessors(multiprocessors);
  if (counted != Status::ok) return counted;
  const int clusters = tiles < multiprocessors / blocks ? tiles : multiprocessors / blocks;
  return launch_clusters(blocks, problem.ensemble_first ? decode<type, true> : decode<type, false>, clusters * blocks,
                         threads, sizeof(SharedMemory), stream, decoder(problem, out, workspace), tiles);
}

}  // namespace

Status forward_wgmma(Type type, const LocalImplicit& p, void* out, void* workspace, void* stream) {
  return (type == Type::bfloat16 ? forward<Type::bfloat16> : forward<Type::float16>)(p, out, workspace, stream);
}

}  // namespace cuda
}  // namespace inr
