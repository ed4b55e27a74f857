// Runs tasks on a useful number of threads.
#pragma once

#include <atomic>

#include "../../common/threads.h"
#include "../../inr.h"
#include "simd.h"

namespace inr {
namespace INR_ISA {

// The number of threads that are worth starting: each gets at least some 5 MFLOP, more than it takes to start one.
INR_INLINE int useful_threads(double flops, int threads) {
  const double useful = flops / 5e6 + 1;
  return useful < threads ? int(useful) : threads;
}

// Calls work(worker, i), which returns a Status, for i in [0, count) in any order, until one fails. Every thread
// creates its own worker by make(); a worker that converts to false is out of memory.
template <class Make, class F>
Status for_each_task(int threads, std::int64_t count, Make&& make, F&& work) {
  std::atomic<std::int64_t> next{0};
  std::atomic<Status> status{Status::ok};
  parallel(threads, [&](int) {
    auto worker = make();
    if (!worker) status = Status::out_of_memory;
    for (std::int64_t i; status == Status::ok && (i = next++) < count;) {
      const Status done = work(worker, i);
      if (done != Status::ok) status = done;
    }
  });
  return status;
}

}  // namespace INR_ISA
}  // namespace inr
