#pragma once

#include <cstddef>

namespace inr {

// Aligned memory that kernels work in, uninitialised; nullptr where there is none. give_back takes what was asked for.
//
// Up to 16 MB that were given back stay for the next call: the system takes longer to hand out fresh pages for a small
// problem than its kernel to run (16 feature maps of 16 x 16: 0.5 of 2 ms).
void* take(std::size_t bytes);
void give_back(void* data, std::size_t bytes);

}  // namespace inr
