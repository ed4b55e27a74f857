// Launching kernels.
#pragma once

#include "inr.h"

namespace inr {
namespace cuda {

// Returns ok, or cuda_failed and stores the error for cuda_failure().
Status to_status(cudaError_t);

// Of the current device: the shared memory that a block may use, in bytes, and the number of multiprocessors.
Status shared_limit(int& bytes);
Status count_multiprocessors(int& count);

// Launches a grid in clusters of `blocks` blocks along x, with `shared` bytes of shared memory per block.
template <class... Parameters, class... Arguments>
Status launch_clusters(unsigned blocks, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                       std::size_t shared, void* stream, const Arguments&... arguments) {
  if (shared > 48 << 10) {  // more than the default limit
    const Status allowed =
        to_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    if (allowed != Status::ok) return allowed;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster, config.numAttrs = blocks > 1;
  return to_status(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared, void* stream,
              const Arguments&... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared, stream, arguments...);
}

}  // namespace cuda
}  // namespace inr
