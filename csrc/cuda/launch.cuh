// How kernels start, and how they find their shared memory.
#pragma once

#include "inr.h"

namespace inr {
namespace cuda {

// The bytes that the launch asked for.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

Status failed(cudaError_t);  // ok if it is none, else keeps its name for cuda_failure()

// Of the current device: bytes that a block may have, and multiprocessors.
Status shared_limit(int& bytes);
Status count_multiprocessors(int& count);

// In clusters of so many blocks.
template <class... Parameters, class... Arguments>
Status launch_clusters(unsigned blocks, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                       std::size_t shared, void* stream, const Arguments&... arguments) {
  if (shared > 48 << 10) {  // more than a kernel has unasked
    const Status allowed =
        failed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    if (allowed != Status::ok) return allowed;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster, config.numAttrs = blocks > 1;
  return failed(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared, void* stream,
              const Arguments&... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared, stream, arguments...);
}

}  // namespace cuda
}  // namespace inr
