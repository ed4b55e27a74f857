#include "cuda/launch.cuh"

namespace inr {
namespace {
thread_local cudaError_t last = cudaSuccess;
}  // namespace

namespace cuda {
Status failed(cudaError_t error) {
  if (error == cudaSuccess) return Status::ok;
  last = error;
  return Status::cuda_failed;
}

namespace {
Status attribute(cudaDeviceAttr which, int& value) {
  int device = 0;
  const Status known = failed(cudaGetDevice(&device));
  return known == Status::ok ? failed(cudaDeviceGetAttribute(&value, which, device)) : known;
}
}  // namespace

Status shared_limit(int& bytes) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, bytes); }
Status count_multiprocessors(int& count) { return attribute(cudaDevAttrMultiProcessorCount, count); }
}  // namespace cuda

const char* cuda_failure() { return cudaGetErrorString(last); }

}  // namespace inr
