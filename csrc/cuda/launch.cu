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

Status count_multiprocessors(int& count) {
  int device;
  const Status found = failed(cudaGetDevice(&device));
  return found == Status::ok ? failed(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) : found;
}
}  // namespace cuda

const char* cuda_failure() { return cudaGetErrorString(last); }

}  // namespace inr
