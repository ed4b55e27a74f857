// Shared memory, and PTX instructions without a C++ equivalent. Two 16-bit floats are stored in an unsigned, the first in
// its low half.
#pragma once

#include "inr.h"

namespace inr {
namespace cuda {

// [shared] bytes of the launch, aligned to 1024.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

template <Type type>
__device__ __forceinline__ float2 unpack(unsigned pair) {
  if constexpr (type == Type::bfloat16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  float2 v;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(v.x), "=f"(v.y) : "r"(pair));
  return v;
}

template <Type type>
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned pair;
  if constexpr (type == Type::bfloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// `pack` of the ReLUs; propagates NaN.
template <Type type>
__device__ __forceinline__ unsigned pack_relu(float low, float high) {
  unsigned pair;
  if constexpr (type == Type::bfloat16)
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// d [16, 8] += a [16, 16] b [16, 8], over a warp. Lane 4 g + t holds
// - of d: columns 2 t, 2 t + 1 of rows g (d[0], d[1]) and g + 8 (d[2], d[3]);
// - of a: columns 2 t, 2 t + 1 of rows g (a[0]) and g + 8 (a[1]), and columns 2 t + 8, 2 t + 9 (a[2], a[3]);
// - of b: column g, rows 2 t, 2 t + 1 (b0) and 2 t + 8, 2 t + 9 (b1).
// Volatile: all lanes must execute it together, so that it may not move into a branch.
template <Type type>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (type == Type::bfloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Loads four matrices of 8 x 8 16-bit values from shared memory, transposed, over a warp. Lanes 8 i ... 8 i + 7 give the
// rows of matrix i, 16 bytes each; lane 4 g + t gets the values of column g of rows 2 t and 2 t + 1 of matrix i in d[i].
__device__ __forceinline__ void load_transposed(unsigned (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(unsigned(__cvta_generic_to_shared(row))) : "memory");
}

// 2^x with a relative error of 2^-22; subnormal results are zero.
__device__ __forceinline__ float exp2_fast(float x) {
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
}

// Copies 16 bytes from global to shared memory, bypassing registers and the L1 cache.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"(unsigned(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `groups` of this thread's commits are pending.
template <int groups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(groups) : "memory");
}

}  // namespace cuda
}  // namespace inr
