#include "cuda_runtime.h"

#include <unordered_map>

namespace machine {
namespace {

constexpr int default_shared = 48 << 10;  // bytes of a block without an opt-in
constexpr unsigned max_cluster = 8;

std::unordered_map<const void*, int> allowed;  // by kernel
const char* reason = "no error";

cudaError_t refuse(cudaError_t error, const char* why) {
  reason = why;
  return error;
}

}  // namespace

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > shared_limit) return refuse(cudaErrorInvalidValue, "more shared memory than a block may opt in to");
  allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t check_launch(const cudaLaunchConfig_t& c, const void* kernel, unsigned& cluster) {
  const auto invalid = [](const char* why) { return refuse(cudaErrorInvalidConfiguration, why); };
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    if (c.attrs[i].id != cudaLaunchAttributeClusterDimension) return invalid("an unknown attribute");
    const auto& size = c.attrs[i].val.clusterDim;
    if (size.y != 1 || size.z != 1) return invalid("clusters are along x");
    cluster = size.x;
  }
  const dim3 grid = c.gridDim, block = c.blockDim;
  if (!grid.x || !grid.y || !grid.z) return invalid("an empty grid");
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return invalid("too large a grid");
  if (block.x * block.y * block.z > 1024) return invalid("too many threads");
  if (!cluster || cluster > max_cluster || grid.x % cluster) return invalid("the grid is not of whole clusters");
  const auto found = allowed.find(kernel);
  const int shared = found == allowed.end() ? default_shared : found->second;
  if (c.dynamicSmemBytes > std::size_t(shared)) return invalid("shared memory without an opt-in");
  launches.push_back({grid.x, block.x, unsigned(c.dynamicSmemBytes), cluster, c.stream, {}});
  return cudaSuccess;
}

}  // namespace machine

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? machine::multiprocessors : machine::shared_limit;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return machine::reason; }
