// How kernels start, and how they find their shared memory.
#pragma once

#include "inr.h"

namespace inr {
namespace cuda {

// The bytes that the launch asked for.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

Status failed(cudaError_t);  // ok if it is none, else keeps its name for cuda_failure()

Status shared_limit(int& bytes);      // of a block on the current device

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared, void* stream,
              const Arguments&... arguments) {
  if (shared > 48 << 10) {  // more than a kernel has unasked
    const Status allowed =
        failed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    if (allowed != Status::ok) return allowed;
  }
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return failed(cudaGetLastError());
}

}  // namespace cuda
}  // namespace inr
