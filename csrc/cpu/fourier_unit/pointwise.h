// 1 x 1 convolutions as a product of matrices, for conv2d (pointwise.cpp); float32 and float64.
#pragma once

#include "../../inr.h"
#include "../common/simd.h"

namespace inr {
namespace INR_ISA {

// Whether convolve_pointwise computes the convolution.
bool is_pointwise(const Conv2d& p);
// As conv2d and prepare_conv2d (inr.h), if is_pointwise.
Status convolve_pointwise(Type type, const Conv2d& p, void* out);
Status prepare_pointwise(Type type, const Conv2d& p, void* prepared, std::int64_t* size);

}  // namespace INR_ISA
}  // namespace inr
