#pragma once

namespace inr {

// Runs job(context, i) for i in [0, count), each on a thread of its own; the caller's is the last.
//
// Threads live for one call: an OpenMP pool would be dead in a forked child, and a start costs some
// 50 us against kernels of milliseconds. Where the system gives no thread, the caller does its work.
void parallel(int count, void (*job)(void* context, int i), void* context);

template <class F>
void parallel(int count, F&& job) {
  parallel(count, [](void* f, int i) { (*static_cast<F*>(f))(i); }, &job);
}

}  // namespace inr
