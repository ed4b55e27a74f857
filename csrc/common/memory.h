// A pool of buffers for the kernels' working memory, for gradients and for large outputs.
#pragma once

#include <cstddef>

namespace inr {

// Returns uninitialised memory, aligned to 64 bytes, or nullptr. Pass the same size to deallocate.
//
// Freed buffers of up to 128 MB in total are cached for the next call, until release_memory: the system takes longer to
// provide fresh pages than many kernels take to fill them (elementwise_filter's gradients, 42 MB: 6 of 11 ms;
// unmask_attention on 16 maps of 16 x 16: 0.5 of 2 ms; LaMa on 512 x 512: 30 of 500 ms).
void* allocate(std::size_t bytes);
void deallocate(void* data, std::size_t bytes);
// Frees the cached buffers.
void release_memory();

}  // namespace inr
