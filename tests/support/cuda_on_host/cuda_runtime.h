// Replaces the CUDA runtime that csrc/cuda/launch.cuh and launch.cu call: launches are checked as a driver does, recorded
// and run by machine.h.
#pragma once

#include "machine.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct { unsigned x, y, z; } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
const char* cudaGetErrorString(cudaError_t);

namespace machine {
cudaError_t allow_shared(const void* kernel, int bytes);
// Whether a driver takes the launch; sets the blocks of a cluster.
cudaError_t check_launch(const cudaLaunchConfig_t&, const void* kernel, unsigned& cluster);
}  // namespace machine

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return machine::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  unsigned cluster = 1;
  const cudaError_t error = machine::check_launch(*c, reinterpret_cast<const void*>(kernel), cluster);
  if (error != cudaSuccess) return error;
  machine::launches.back().sizes = {unsigned(sizeof(Parameters))...};
  machine::launch(c->gridDim, c->blockDim, c->dynamicSmemBytes, [&] { kernel(arguments...); }, cluster);
  return cudaSuccess;
}
