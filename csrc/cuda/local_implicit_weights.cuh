// The weights of local_implicit in the order in which its kernels read them: zero-padded copies in the workspace.
//
// A stage is what is copied to shared memory at once: 1024 times the 16 bytes that a lane loads for two products, a
// weight's row at eight consecutive input channels. A hidden layer [W, W] is [parts of its outputs][parts of its
// inputs], a stage each of [256 / part times 32 inputs][part / 8 tiles of 8 outputs][lane]; the last layer is stages of
// [1024 / W tiles of 8 outputs][W / 32 times 32 inputs][lane].
//
// For wgmma a hidden layer is slices instead, [W / 64][W outputs][64 inputs], both in the order of `channel`: the image
// of shared memory that its matrix descriptors want, of an output's eight times 16 bytes the q-th at q ^ output % 8.
#pragma once

#include "cuda/local_implicit.cuh"

namespace inr {
namespace cuda {

constexpr int stage = 1024;  // uint4

// Stages of `hidden` layers and the last.
template <int W>
__host__ __device__ __forceinline__ int stages(int hidden, int outputs) {
  return hidden * (W * W / 8 / stage) + (outputs * W + 8 * stage - 1) / (8 * stage);
}

int padded_width(const LocalImplicit&);  // W: 128 or 256
// The problem on the device, reading a workspace that is yet to be packed.
Decoder decoder(const LocalImplicit&, void* out, void* workspace);
// part: outputs of a hidden layer in a stage, 32 or 64; W: slices.
Status pack(Type, const LocalImplicit&, int part, void* workspace, void* stream);

// local_implicit_sm90.cu, where W is 256 and there is a hidden layer.
Status forward_wgmma(Type, const LocalImplicit&, void* out, void* workspace, void* stream);

}  // namespace cuda
}  // namespace inr
