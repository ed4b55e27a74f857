// A GPU emulation for tests: runs the source of a kernel, compiled by the host's compiler, block by block.
//
// The threads of a block or cluster are fibers. Each warp runs until it has to wait, one warp after the other, in
// reverse order in every other cluster, so that missing barriers lead to wrong results. In random orders, warps of up
// to three clusters alternate, which detects memory that blocks share by mistake. Shared memory is initialised with
// NaN, and the destination of an asynchronous copy is NaN until the copy is waited for. A launch fails if a block
// deadlocks or the lanes of a warp execute different collective instructions.
#pragma once

#include <math.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the running fiber.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace machine {

constexpr unsigned warp = 32;

// Runs a grid in clusters of `cluster` blocks along x; throws std::runtime_error if it fails.
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel,
            unsigned cluster = 1);

extern int shared_limit;  // bytes that a block may use
constexpr int multiprocessors = 5;

// What was launched, since it was last cleared.
struct Launch {
  unsigned blocks, threads, shared, cluster;
  const void* stream;
  std::array<unsigned, 8> sizes = {};  // of the parameters, in bytes
};
extern std::vector<Launch> launches;
extern bool truncating;  // whether products are rounded as in `truncated`
// sum + a[0] b[0] + ... + a[count - 1] b[(count - 1) step], rounded as a model of tensor cores: 8 products are added at
// once, without bits that are more than 24 below the largest term, and the sum is truncated to float.
float truncated(float sum, const float* a, const float* b, unsigned step, unsigned count);

// The seed of random orders of clusters and of their warps; 0: one cluster after the other, in order, the warps of
// every other one in reverse.
extern unsigned order_seed;

extern const char* (*final_check)();  // called after each cluster; returns an error or nullptr
[[noreturn]] void fail(const char* reason);     // ends the current launch
void wait(const std::function<bool()>& ready);  // runs other fibers until ready() is true

std::shared_ptr<void>& cluster_state();  // anything that belongs to the cluster; nullptr when it begins
unsigned thread();                       // index in the cluster
unsigned thread_count();                 // of the cluster
unsigned cluster_rank();                 // of this block
char* shared_memory();
char* shared_memory(unsigned rank);  // of another block of the cluster, which must not have ended
void check_shared(const void* address, std::size_t bytes);  // fails if not within this block's shared memory
void block_barrier();
void cluster_barrier();

// sum + the products, in order; or as `truncated`.
inline float add_products(float sum, const float* a, const float* b, unsigned step, unsigned count) {
  if (truncating) return truncated(sum, a, b, step, count);
  for (unsigned k = 0; k < count; ++k) sum += a[k] * b[k * step];
  return sum;
}

// A collective instruction of a warp: waits for all lanes, then the last one to arrive does the work of all.
// lanes: [warp] the `mine` of each lane
using Lanes = void* const[warp];
void warp_synchronize(const char* instruction, void* mine, void (*work)(Lanes&));

// Asynchronous copies; the data arrives when the thread waits for it.
void copy_async(void* to, const void* from, std::size_t bytes);
void commit_copies();
void wait_for_copies(std::size_t groups_left);

}  // namespace machine

inline void __syncthreads() { machine::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) {
  machine::warp_synchronize("syncwarp", nullptr, [](machine::Lanes&) {});
}

namespace machine {
template <class V>
struct Shuffle {
  V value, result;
  unsigned source;
  static void work(Lanes& lanes) {
    for (void* lane : lanes) {
      Shuffle& s = *static_cast<Shuffle*>(lane);
      s.result = static_cast<Shuffle*>(lanes[s.source % warp])->value;
    }
  }
};
}  // namespace machine

template <class V>
V __shfl_sync(unsigned, V value, int source) {
  machine::Shuffle<V> s{value, V(), unsigned(source)};
  machine::warp_synchronize("shfl", &s, machine::Shuffle<V>::work);
  return s.result;
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bits) {
  return __shfl_sync(mask, value, int(threadIdx.x % machine::warp) ^ bits);
}

template <class V>
V min(V a, V b) { return b < a ? b : a; }
template <class V>
V max(V a, V b) { return a < b ? b : a; }
