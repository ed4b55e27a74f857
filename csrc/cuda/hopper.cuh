// Instructions of sm_90a, in addition to ptx.cuh: barriers in shared memory that count the bytes of copies, copies to
// all blocks of a cluster, and the matrix product of a warpgroup (wgmma).
#pragma once

#include "inr.h"

namespace inr {
namespace cuda {

struct Barrier {
  std::uint64_t state;
};

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return unsigned(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of all blocks of the cluster; the threads of a warp may have diverged.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

// A phase of the barrier is complete after `arrivals` arrivals and all bytes that they expect.
__device__ __forceinline__ void initialize(Barrier& b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(&b)), "r"(arrivals) : "memory");
}
// Makes the barriers that this thread has initialized visible to copies and to the cluster.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(Barrier& b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(&b)) : "memory");
}
__device__ __forceinline__ void arrive_expecting(Barrier& b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(shared_address(&b)), "r"(bytes) : "memory");
}
// Arrives at the same barrier of another block of the cluster.
__device__ __forceinline__ void arrive_remote(Barrier& b, unsigned rank) {
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
               " mbarrier.arrive.shared::cluster.b64 _, [there]; }"
               :: "r"(shared_address(&b)), "r"(rank) : "memory");
}
// Waits until the phase of this parity is complete; the phase before the first has parity 1.
__device__ __forceinline__ void wait(Barrier& b, unsigned parity) {
  unsigned complete;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(complete) : "r"(shared_address(&b)), "r"(parity) : "memory");
  } while (!complete);
}

// Copies to the same address in each block of the mask; each block's barrier counts the bytes.
// shared, global: [bytes], aligned to 16; bytes: a multiple of 16
__device__ __forceinline__ void copy_to_blocks(void* shared, const void* global, unsigned bytes, Barrier& b,
                                               unsigned short mask) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
               " [%0], [%1], %2, [%3], %4;"
               :: "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(&b)), "h"(mask)
               : "memory");
}

// Changes the number of registers of each thread of this warpgroup.
template <int registers>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(registers));
}
template <int registers>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(registers));
}

// Must come between the last access to a product's registers and the product.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `groups` commits are pending. The registers of pending products must not be accessed, nor their
// matrices overwritten.
template <int groups>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(groups) : "memory");
}

#define INR_4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define INR_16(d, n) INR_4(d, n), INR_4(d, n + 1), INR_4(d, n + 2), INR_4(d, n + 3)
#define INR_64(d, n) INR_16(d, n), INR_16(d, n + 4), INR_16(d, n + 8), INR_16(d, n + 12)
#define INR_WGMMA(type)                                                                                          \
  asm volatile(                                                                                                  \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21,"    \
      " %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41,"     \
      " %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61,"     \
      " %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81,"     \
      " %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101,"   \
      " %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118,"   \
      " %119, %120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"      \
      : INR_64(d, 0), INR_64(d, 16)                                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d [64, 256] += a [64, 16] b [16, 256], over a warpgroup; pending until its group is waited for. Warp w of the four
// holds the rows [16 w, 16 w + 16): d as 32 tiles of 8 columns in mma's layout, and a in mma's layout. b: a matrix
// descriptor.
template <Type type>
__device__ __forceinline__ void wgmma(float (&d)[32][4], const unsigned (&a)[4], std::uint64_t b) {
  if constexpr (type == Type::bfloat16)
    INR_WGMMA("bf16");
  else
    INR_WGMMA("f16");
}
#undef INR_4
#undef INR_16
#undef INR_64
#undef INR_WGMMA

}  // namespace cuda
}  // namespace inr
