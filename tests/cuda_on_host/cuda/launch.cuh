// What csrc/cuda/launch.cuh is on the host.
#pragma once

#include "inr.h"
#include "machine.h"

namespace inr {
namespace cuda {

inline char* shared_memory() { return machine::shared_memory(); }

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared, void*,
              const Arguments&... arguments) {
  if (shared > 48 << 10) return Status::cuda_failed;  // more is to be asked for before
  machine::launch(grid, threads, shared, [&] { kernel(arguments...); });
  return Status::ok;
}

template <class... Parameters, class... Arguments>
Status launch_clusters(unsigned blocks, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                       std::size_t shared, void*, const Arguments&... arguments) {
  machine::launch(grid, threads, shared, [&] { kernel(arguments...); }, blocks);
  return Status::ok;
}

inline Status count_multiprocessors(int& count) { return count = 5, Status::ok; }

}  // namespace cuda
}  // namespace inr
