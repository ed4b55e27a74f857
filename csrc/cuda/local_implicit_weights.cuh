// The weights of local_implicit in the order in which its kernels read them: zero-padded copies in the workspace.
//
// A stage is copied to shared memory at once. It has 1024 elements of 16 bytes; an element is what a lane loads for two
// products, eight consecutive input channels of an output. A hidden layer [W, W] is [parts of the outputs][parts of the
// inputs] of stages, each [256 / part groups of 32 inputs][part / 8 tiles of 8 outputs][lane]. The last layer is stages
// of [1024 / W tiles of 8 outputs][W / 32 groups of 32 inputs][lane].
//
// For wgmma a hidden layer is slices instead, [W / 64][W outputs][64 inputs], both in the order of `channel`. A slice
// has the layout of its matrix descriptors: the q-th 16 bytes of the eight of an output are stored at q ^ output % 8.
#pragma once

#include "cuda/local_implicit.cuh"

namespace inr {
namespace cuda {

constexpr int stage = 1024;  // uint4

// The number of stages of `hidden` layers and the last.
template <int W>
__host__ __device__ __forceinline__ int stages(int hidden, int outputs) {
  return hidden * (W * W / 8 / stage) + (outputs * W + 8 * stage - 1) / (8 * stage);
}

int padded_width(const LocalImplicit&);  // W: 128 or 256
// The problem as the kernels read it, from a workspace that `pack` fills.
// out: [batch, rows, cols, widths[depth]]; workspace: [local_implicit_workspace_cuda] bytes
Decoder decoder(const LocalImplicit&, void* out, void* workspace);
// Fills the workspace. part: the number of a hidden layer's outputs in a stage (32 or 64), or W for slices.
Status pack(Type, const LocalImplicit&, int part, void* workspace, void* stream);

// In local_implicit_sm90.cu; for W = 256 and at least one hidden layer.
Status forward_wgmma(Type, const LocalImplicit&, void* out, void* workspace, void* stream);

}  // namespace cuda
}  // namespace inr
