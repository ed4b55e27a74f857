#include "threads.h"

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace inr {
namespace {

// Starts a parallel region; GCC's, LLVM's and Intel's OpenMP runtimes all have this function.
using GompParallel = void (*)(void (*region)(void*), void* context, unsigned threads, unsigned flags);

#if defined(__unix__) || defined(__APPLE__)
std::atomic<bool> forked{false};
// Registered when the library is loaded: the fork may happen before the first kernel runs.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

GompParallel find_openmp() {
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
}
#else
GompParallel find_openmp() { return nullptr; }
#endif

struct Jobs {
  void (*job)(void*, int);
  void* context;
  int count;
  std::atomic<int> next{0};

  // Takes jobs until none are left, because OpenMP may provide fewer threads than requested.
  static void work(void* self) {
    Jobs& jobs = *static_cast<Jobs*>(self);
    for (int i; (i = jobs.next++) < jobs.count;) jobs.job(jobs.context, i);
  }
};

}  // namespace

bool has_openmp() { return find_openmp() != nullptr; }

void parallel(int count, void (*job)(void*, int), void* context) {
  Jobs jobs{job, context, count};
  if (count == 1) return Jobs::work(&jobs);
  if (const GompParallel run = find_openmp()) return run(Jobs::work, &jobs, unsigned(count), 0);
  std::vector<std::thread> threads;
  try {
    threads.reserve(count);
    for (int i = 1; i < count; ++i) threads.emplace_back(Jobs::work, &jobs);
  } catch (const std::exception&) {  // no further thread can be started
  }
  Jobs::work(&jobs);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace inr
