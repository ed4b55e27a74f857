#include "threads.h"

#include <exception>
#include <thread>
#include <vector>

namespace inr {

void parallel(int count, void (*job)(void*, int), void* context) {
  std::vector<std::thread> threads;
  int next = 0;
  try {
    threads.reserve(count);
    for (; next < count - 1; ++next) threads.emplace_back(job, context, next);
  } catch (const std::exception&) {  // no thread to be had: the loop below does its share
  }
  for (; next < count; ++next) job(context, next);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace inr
