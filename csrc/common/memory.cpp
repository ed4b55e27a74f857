#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <mutex>

namespace inr {
namespace {

constexpr std::size_t alignment = 64, page = 4 << 10, capacity = 128 << 20;
#ifdef __SANITIZE_ADDRESS__  // a cached buffer would hide a use after free
constexpr bool caching = false;
#else
constexpr bool caching = true;
#endif

// Rounds to one of 16 sizes per power of two, so that a slightly larger or smaller request finds a cached buffer.
std::size_t rounded(std::size_t bytes) {
  std::size_t step = alignment;
  while (step * 16 < bytes) step *= 2;
  return (std::max<std::size_t>(bytes, 1) + step - 1) / step * step;
}

// The cache, oldest first. Never destroyed, because other threads may still run after main has returned.
struct CachedBuffer {
  void* data;
  std::size_t bytes;
} cache[64];
CachedBuffer* end = cache;
std::size_t total = 0;
std::mutex mutex;  // only tried: a forked child may have inherited it locked

void* remove(CachedBuffer* entry) {
  void* data = entry->data;
  total -= entry->bytes;
  end = std::move(entry + 1, end, entry);
  return data;
}

}  // namespace

void* allocate(std::size_t bytes) {
  if (bytes > PTRDIFF_MAX) return nullptr;  // rounding would overflow
  bytes = rounded(bytes);
  if (caching && bytes >= page) {
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (lock) {
      CachedBuffer* entry = std::find_if(cache, end, [&](const CachedBuffer& c) { return c.bytes == bytes; });
      if (entry != end) return remove(entry);
    }
  }
  return std::aligned_alloc(alignment, bytes);
}

void deallocate(void* data, std::size_t bytes) {
  bytes = rounded(bytes);
  if (caching && data && page <= bytes && bytes <= capacity) {
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (lock) {
      while (total + bytes > capacity || end == std::end(cache)) std::free(remove(cache));
      *end++ = {data, bytes};
      total += bytes;
      return;
    }
  }
  std::free(data);
}

void release_memory() {
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  while (lock && end != cache) std::free(remove(cache));
}

}  // namespace inr
