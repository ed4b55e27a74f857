// Work that is cut into tasks, on as many threads as it is worth.
#pragma once

#include <atomic>

#include "../common/threads.h"
#include "../inr.h"
#include "simd.h"

namespace inr {
namespace INR_ISA {

// Threads worth starting: each gets at least some 20 MFLOP.
INR_INLINE int useful_threads(double flops, int threads) {
  const double useful = flops / 2e7 + 1;
  return useful < threads ? int(useful) : threads;
}

// Status work(worker, i) for i in [0, count), in no order, until one fails. Every thread has a worker of its own,
// make(), which is false where there is no memory for it.
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
