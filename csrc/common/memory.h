#pragma once

#include <cstddef>

namespace inr {

// Aligned memory, uninitialised; nullptr where there is none. give_back takes what was asked for.
//
// Up to 64 MB that were given back stay for the next call, until release_memory: the system takes longer to hand out
// fresh pages than many a kernel to fill them (elementwise_filter's gradients, 42 MB: 6 of 11 ms; unmask_attention on
// 16 maps of 16 x 16: 0.5 of 2 ms).
void* take(std::size_t bytes);
void give_back(void* data, std::size_t bytes);
void release_memory();

}  // namespace inr
