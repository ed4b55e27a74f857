#pragma once

namespace inr {

// Runs job(context, i) for i in [0, count) on up to `count` threads, including the caller's.
//
// The threads are those of the OpenMP runtime that the process has loaded (torch loads one): its threads spin for some
// milliseconds while they wait for work, so additional threads would compete with them for the cores. Without OpenMP,
// and in a forked child, where the OpenMP pool is unusable, threads are started for each call, at some 50 us each.
// Where the system provides fewer threads, the existing ones do all of the work.
void parallel(int count, void (*job)(void* context, int i), void* context);

// Whether `parallel` uses OpenMP's threads.
bool has_openmp();

template <class F>
void parallel(int count, F&& job) {
  parallel(count, [](void* f, int i) { (*static_cast<F*>(f))(i); }, &job);
}

}  // namespace inr
