// Picks the widest instruction set that was built and that this processor has.
#include <cstdlib>
#include <cstring>

#include "../cpu/kernels.h"

namespace inr {
namespace {

struct Build {
  const char* name;
  bool runs;
  decltype(&local_implicit_forward) forward;
  decltype(&local_implicit_backward) backward;
  decltype(&elementwise_filter_forward) filter_forward;
  decltype(&elementwise_filter_backward) filter_backward;
  decltype(&unmask_attention_forward) unmask_forward;
  decltype(&unmask_attention_backward) unmask_backward;
  decltype(&neighborhood_attention_forward) attention_forward;
  decltype(&neighborhood_attention_backward) attention_backward;
  decltype(&spectrum_product) product;
  decltype(&conv3x3) convolve;
};

#define INR_BUILD(isa, runs)                                                                    \
  {#isa, bool(runs), isa::local_implicit_forward, isa::local_implicit_backward,                 \
   isa::elementwise_filter_forward, isa::elementwise_filter_backward,                           \
   isa::unmask_attention_forward, isa::unmask_attention_backward,                               \
   isa::neighborhood_attention_forward, isa::neighborhood_attention_backward,                   \
   isa::spectrum_product, isa::conv3x3}

const Build& build() {
  static const Build& chosen = []() -> const Build& {
    static const Build builds[] = {
#ifdef INR_HAVE_AVX512BF16
        INR_BUILD(avx512bf16, __builtin_cpu_supports("avx512bf16")),
#endif
#ifdef INR_HAVE_AVX512
        INR_BUILD(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")),
#endif
#ifdef INR_HAVE_AVX2
        INR_BUILD(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
        INR_BUILD(generic, true),
    };
    const char* wish = std::getenv("INR_KERNELS_ISA");  // for tests: a narrower set than the machine's
    const Build* last = builds + sizeof builds / sizeof *builds - 1;
    for (const Build* b = builds; b < last; ++b)
      if (b->runs && (!wish || !*wish || !std::strcmp(wish, b->name))) return *b;
    return *last;
  }();
  return chosen;
}

}  // namespace

const char* isa() { return build().name; }

Status local_implicit_forward(Type type, const LocalImplicit& p, void* out) { return build().forward(type, p, out); }

Status local_implicit_backward(Type type, const LocalImplicit& p, const void* grad_out,
                               const LocalImplicitGradients& grads) {
  return build().backward(type, p, grad_out, grads);
}

Status elementwise_filter_forward(Type type, const ElementwiseFilter& p, void* out) {
  return build().filter_forward(type, p, out);
}

Status elementwise_filter_backward(Type type, const ElementwiseFilter& p, const void* grad_out, void* grad_x,
                                   void* grad_kernel) {
  return build().filter_backward(type, p, grad_out, grad_x, grad_kernel);
}

Status unmask_attention_forward(Type type, const UnmaskAttention& p, void* out, void* softmax) {
  return build().unmask_forward(type, p, out, softmax);
}

Status unmask_attention_backward(Type type, const UnmaskAttention& p, const void* out, const void* softmax,
                                 const void* grad_out, void* grad_feat) {
  return build().unmask_backward(type, p, out, softmax, grad_out, grad_feat);
}

Status neighborhood_attention_forward(Type type, const NeighborhoodAttention& p, const Tokens& out, void* lse) {
  return build().attention_forward(type, p, out, lse);
}

Status neighborhood_attention_backward(Type type, const NeighborhoodAttention& p, const void* lse,
                                       const Tokens& grad_out, const void* grad_lse,
                                       const NeighborhoodAttentionGradients& grads) {
  return build().attention_backward(type, p, lse, grad_out, grad_lse, grads);
}

Status spectrum_product(Type type, const SpectrumProduct& p, void* out) { return build().product(type, p, out); }

Status conv3x3(Type type, const Conv3x3& p, void* out) { return build().convolve(type, p, out); }

}  // namespace inr
