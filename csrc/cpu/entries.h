// The list of CPU entry points, from which their declarations per instruction set and the dispatch table are made.
#pragma once

#include "../inr.h"

// Each is declared in inr.h, and defined in csrc/cpu in the namespace of the instruction set.
#define INR_CPU_ENTRIES(ENTRY)           \
  ENTRY(local_implicit_forward)          \
  ENTRY(local_implicit_backward)         \
  ENTRY(elementwise_filter_forward)      \
  ENTRY(elementwise_filter_backward)     \
  ENTRY(unmask_attention_forward)        \
  ENTRY(unmask_attention_backward)       \
  ENTRY(neighborhood_attention_forward)  \
  ENTRY(neighborhood_attention_backward) \
  ENTRY(mlp)                             \
  ENTRY(spectrum_product)                \
  ENTRY(prepare_spectrum_product)        \
  ENTRY(conv3x3)                         \
  ENTRY(prepare_conv3x3)                 \
  ENTRY(conv3x3_weight_gradient)         \
  ENTRY(prepare_conv2d)                  \
  ENTRY(pack_signs)                      \
  ENTRY(select_by_signs)                 \
  ENTRY(fingerprint)                     \
  ENTRY(multiply_adds)                   \
  ENTRY(conv2d)

namespace inr {

#define INR_DECLARE(entry) decltype(inr::entry) entry;
namespace generic { INR_CPU_ENTRIES(INR_DECLARE) }
namespace avx2 { INR_CPU_ENTRIES(INR_DECLARE) }
namespace avx512 { INR_CPU_ENTRIES(INR_DECLARE) }
namespace avx512bf16 { INR_CPU_ENTRIES(INR_DECLARE) }
namespace amx { INR_CPU_ENTRIES(INR_DECLARE) }
#undef INR_DECLARE

// The entry points of one instruction set.
struct CpuEntries {
  const char* isa;  // generic, avx2, avx512, avx512bf16 or amx
  bool supported;   // by this processor
#define INR_POINTER(entry) decltype(&inr::entry) entry;
  INR_CPU_ENTRIES(INR_POINTER)
#undef INR_POINTER
};

// Those of the widest instruction set that was built and that this processor supports.
const CpuEntries& cpu();

}  // namespace inr
