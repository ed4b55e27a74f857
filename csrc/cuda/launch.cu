#include "cuda/launch.cuh"

namespace inr {
namespace {
thread_local cudaError_t last_error = cudaSuccess;
}  // namespace

namespace cuda {
Status to_status(cudaError_t error) {
  if (error == cudaSuccess) return Status::ok;
  last_error = error;
  return Status::cuda_failed;
}

namespace {
Status attribute(cudaDeviceAttr which, int& value) {
  int device = 0;
  const Status known = to_status(cudaGetDevice(&device));
  return known == Status::ok ? to_status(cudaDeviceGetAttribute(&value, which, device)) : known;
}
}  // namespace

Status shared_limit(int& bytes) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, bytes); }
Status count_multiprocessors(int& count) { return attribute(cudaDevAttrMultiProcessorCount, count); }
}  // namespace cuda

const char* cuda_failure() { return cudaGetErrorString(last_error); }

}  // namespace inr
