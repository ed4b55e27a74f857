// local_implicit's forward in half precision with wgmma, for sm_90a and hidden layers of 129 to 256 channels.
//
// A warpgroup takes 64 rows through all layers, their hidden state in its registers as in local_implicit.cu. Two such
// groups of a block share the weights, which a thread of a third streams through a ring of slices, 64 inputs of a
// layer each. Of a cluster's two blocks each fetches half a slice for both: alone they would ask the L2 cache for 32
// bytes a cycle each, more than it gives. The groups take turns, layer by layer: while one multiplies, the other
// rounds, writes and samples the map.
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
constexpr int multiplying = 232, copying = 40;  // registers of a thread
static_assert(groups * multiplying + copying <= (groups + 1) * 168, "more registers than the launch took");

struct Memory {
  char slot[slots][slice_bytes];  // at a multiple of 1024 bytes, for the swizzle
  Barrier full[slots], empty[slots];
  Barrier turn[groups];  // that this group may multiply
};
static_assert(sizeof(Memory) <= 227 << 10, "more shared memory than a block may have");

// A place in the ring, and the parity of the phase that it is in.
struct Slot {
  int index = 0;
  unsigned parity;

  __device__ __forceinline__ explicit Slot(unsigned parity) : parity(parity) {}
  __device__ __forceinline__ void advance() {
    if (++index == slots) index = 0, parity ^= 1;
  }
};

// The tiles of `cluster_rows` that a cluster decodes.
struct Tiles {
  int begin, end, step;
};

// Of a slice [W outputs][64 inputs], the matrix of inputs 16 k ...: inputs adjacent in rows of 128 bytes, swizzled in
// patterns of 8 outputs, which follow each other.
__device__ __forceinline__ std::uint64_t descriptor(const char* slice, int k) {
  const unsigned start = shared_address(slice) + 32 * k;
  constexpr std::uint64_t swizzle_128 = std::uint64_t(1) << 62, stride = std::uint64_t(1024 / 16) << 32;
  return swizzle_128 | stride | 1 << 16 | (start & 0x3ffff) / 16;
}

__device__ __forceinline__ void stream_weights(const Decoder& p, Memory& memory, Tiles tiles) {
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

template <Type type, bool First>
__device__ __forceinline__ void decode_rows(const Decoder& p, Memory& memory, Tiles tiles, int warp) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = warp / 4;
  const int per_query = !First && p.queries.ensemble ? 4 : 1;
  Slot at(0);
  unsigned turn = group == 0;  // the first group's first turn has come
  const auto first_query = [&](int tile) {
    return (std::int64_t(tile) * cluster_rows + int(cluster_rank()) * block_rows + warp * 16) / per_query;
  };
  const auto release = [&](int slot) {
    if (lane < blocks) arrive_at(memory.empty[slot], lane);
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
      wait(memory.turn[group], turn);
      turn ^= 1;
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
      if (lane == 0) arrive(memory.turn[group ^ 1]);
      if (!First && layer == 0) mine = locate<First>(p.queries, first_query(tile + tiles.step), lane % 16);  // meanwhile
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
  Memory& memory = *reinterpret_cast<Memory*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int s = 0; s < slots; ++s) initialize(memory.full[s], 1), initialize(memory.empty[s], blocks * warps);
    for (int g = 0; g < groups; ++g) initialize(memory.turn[g], warps / groups);
    publish_barriers();
  }
  cluster_barrier();
  const int warp = __shfl_sync(~0u, int(threadIdx.x / 32), 0);  // the compiler is to see that a warp goes one way
  const Tiles mine{int(blockIdx.x / blocks), tiles, int(gridDim.x / blocks)};
  if (warp >= warps) {
    leave_registers<copying>();
    if (threadIdx.x == 32 * warps) stream_weights(p, memory, mine);
  } else {
    take_registers<multiplying>();
    decode_rows<type, First>(p, memory, mine, warp);
  }
  cluster_barrier();  // a block's memory outlives what the other sends there
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
                         threads, sizeof(Memory), stream, decoder(problem, out, workspace), tiles);
}

}  // namespace

Status forward_wgmma(Type type, const LocalImplicit& p, void* out, void* workspace, void* stream) {
  return (type == Type::bfloat16 ? forward<Type::bfloat16> : forward<Type::float16>)(p, out, workspace, stream);
}

}  // namespace cuda
}  // namespace inr
