// Replaces csrc/cuda/launch.cuh on the host.
#pragma once

#include "inr.h"
#include "machine.h"

namespace inr {
namespace cuda {

inline char* shared_memory() { return machine::shared_memory(); }

inline Status shared_limit(int& bytes) { return bytes = machine::shared_limit, Status::ok; }
inline Status count_multiprocessors(int& count) { return count = 5, Status::ok; }

template <class... Parameters, class... Arguments>
Status launch_clusters(unsigned blocks, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                       std::size_t shared, void*, const Arguments&... arguments) {
  if (shared > std::size_t(machine::shared_limit)) return Status::cuda_failed;
  machine::launch(grid, threads, shared, [&] { kernel(arguments...); }, blocks);
  return Status::ok;
}

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared, void* stream,
              const Arguments&... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared, stream, arguments...);
}

}  // namespace cuda
}  // namespace inr
