#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <mutex>

namespace inr {
namespace {

constexpr std::size_t alignment = 64, page = 4 << 10, most = 64 << 20;
#ifdef __SANITIZE_ADDRESS__  // what is kept would hide a use after its end
constexpr bool keeping = false;
#else
constexpr bool keeping = true;
#endif

// So few sizes that the next problem, a little larger or smaller, asks for one that is there.
std::size_t rounded(std::size_t bytes) {
  std::size_t step = alignment;
  while (step * 16 < bytes) step *= 2;
  return (std::max<std::size_t>(bytes, 1) + step - 1) / step * step;
}

// The oldest first. Never destroyed: other threads may outlive main.
struct Kept {
  void* data;
  std::size_t bytes;
} kept[64];
Kept* end = kept;
std::size_t total = 0;
std::mutex mutex;  // only tried: a forked child may have inherited it locked

void* remove(Kept* entry) {
  void* data = entry->data;
  total -= entry->bytes;
  end = std::move(entry + 1, end, entry);
  return data;
}

}  // namespace

void* take(std::size_t bytes) {
  if (bytes > PTRDIFF_MAX) return nullptr;  // no more can be had, nor be rounded
  bytes = rounded(bytes);
  if (keeping && bytes >= page) {
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (lock) {
      Kept* entry = std::find_if(kept, end, [&](const Kept& k) { return k.bytes == bytes; });
      if (entry != end) return remove(entry);
    }
  }
  return std::aligned_alloc(alignment, bytes);
}

void give_back(void* data, std::size_t bytes) {
  bytes = rounded(bytes);
  if (keeping && data && page <= bytes && bytes <= most) {
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (lock) {
      while (total + bytes > most || end == std::end(kept)) std::free(remove(kept));
      *end++ = {data, bytes};
      total += bytes;
      return;
    }
  }
  std::free(data);
}

void release_memory() {
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  while (lock && end != kept) std::free(remove(kept));
}

}  // namespace inr
