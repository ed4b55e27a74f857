#pragma once

namespace inr {

// Runs job(context, i) for i in [0, count), on as many threads, the caller's among them.
//
// They are those of the process's OpenMP where one is loaded (torch brings it): its threads wait for work by spinning
// for some milliseconds, so that threads of our own beside them would share the cores with idlers. In a forked child,
// where an OpenMP pool is dead, and without OpenMP, threads live for one call; a start costs some 50 us.
// Where the system gives fewer threads, those that are there do the work.
void parallel(int count, void (*job)(void* context, int i), void* context);

// Whether `parallel` uses OpenMP's threads.
bool has_openmp();

template <class F>
void parallel(int count, F&& job) {
  parallel(count, [](void* f, int i) { (*static_cast<F*>(f))(i); }, &job);
}

}  // namespace inr
