// The entries that each instruction set's build of csrc/cpu defines.
#pragma once

#include "../inr.h"

#define INR_ENTRIES(isa)                                                        \
  namespace isa {                                                               \
  Status local_implicit_forward(Type, const LocalImplicit&, void* out);         \
  Status local_implicit_backward(Type, const LocalImplicit&, const void* grad_out, \
                                 const LocalImplicitGradients&);                \
  Status elementwise_filter_forward(Type, const ElementwiseFilter&, void* out); \
  Status elementwise_filter_backward(Type, const ElementwiseFilter&, const void* grad_out, void* grad_x, \
                                     void* grad_kernel);                        \
  Status unmask_attention_forward(Type, const UnmaskAttention&, void* out, void* softmax); \
  Status unmask_attention_backward(Type, const UnmaskAttention&, const void* out, const void* softmax, \
                                   const void* grad_out, void* grad_feat);      \
  Status neighborhood_attention_forward(Type, const NeighborhoodAttention&, const Tokens& out, void* lse); \
  Status neighborhood_attention_backward(Type, const NeighborhoodAttention&, const void* lse, const Tokens& grad_out, \
                                         const void* grad_lse, const NeighborhoodAttentionGradients&); \
  Status spectrum_product(Type, const SpectrumProduct&, void* out);             \
  Status conv3x3(Type, const Conv3x3&, void* out);                              \
  }

namespace inr {
INR_ENTRIES(generic)
INR_ENTRIES(avx2)
INR_ENTRIES(avx512)
INR_ENTRIES(avx512bf16)
}  // namespace inr
