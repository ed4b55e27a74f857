#include "pages.h"

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace inr {

void large_pages(void* start, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t page = 2 << 20;
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(start) + page - 1) / page * page;
  const std::uintptr_t last = (reinterpret_cast<std::uintptr_t>(start) + bytes) / page * page;
  if (start && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace inr
