// A GPU for tests: runs a kernel's own source, compiled by the host's compiler, block by block.
//
// The threads of a block, or of a cluster, are fibers. Warps run ahead as far as they can, one after the other and every
// other time from the last on, so that a missing barrier shows; shared memory starts as NaN, and what an asynchronous
// copy will overwrite is NaN from its start to its wait. A block that cannot go on, or whose lanes meet in different
// instructions, fails the launch.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
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

// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace machine {

constexpr unsigned warp = 32;

// Runs the grid, whose blocks go in clusters of so many along x; throws std::runtime_error.
void launch(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel,
            unsigned cluster = 1);

extern int shared_limit;  // bytes a block may have

extern const char* (*last_check)();  // asked when a cluster has ended: what is wrong, or nullptr
[[noreturn]] void fail(const char* why);  // ends the launch that runs
void wait(const std::function<bool()>& ready);  // lets others run until then

unsigned long cluster_number();  // how many went before
unsigned thread();               // of the cluster's thread_count()
unsigned thread_count();
unsigned cluster_rank();         // of this block
char* shared_memory();
char* shared_memory(unsigned rank);  // another block's of the cluster, which has not ended
void check_shared(const void* address, std::size_t bytes);  // within this block's
void block_barrier();
void cluster_barrier();

// All lanes of a warp meet in one instruction; the last to come does the work of all.
using Lanes = void* const[warp];
void warp_meets(const char* instruction, void* mine, void (*work)(Lanes&));

// An asynchronous copy arrives when its thread waits for it.
void copy_async(void* to, const void* from, std::size_t bytes);
void commit_copies();
void wait_for_copies(std::size_t groups_left);

}  // namespace machine

inline void __syncthreads() { machine::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) {
  machine::warp_meets("syncwarp", nullptr, [](machine::Lanes&) {});
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
  machine::warp_meets("shfl", &s, machine::Shuffle<V>::work);
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
