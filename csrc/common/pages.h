#pragma once

#include <cstddef>

namespace inr {

// Asks for large pages under [start, start + bytes), an output; a hint, never an error.
//
// A fresh page costs the system a fault: 4 KB at a time, those of 38 MB take longer than the kernel that fills them
// (12 ms against 5), 2 MB at a time a quarter of that.
void large_pages(void* start, std::size_t bytes);

}  // namespace inr
