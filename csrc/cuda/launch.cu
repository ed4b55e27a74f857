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

Status shared_limit(int& bytes) {
  int device = 0;
  const Status known = failed(cudaGetDevice(&device));
  if (known != Status::ok) return known;
  return failed(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}
}  // namespace cuda

const char* cuda_failure() { return cudaGetErrorString(last); }

}  // namespace inr
