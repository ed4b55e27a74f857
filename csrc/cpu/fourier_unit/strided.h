// 3 x 3 convolutions with stride 2 by Winograd's algorithm, for conv2d (strided.cpp); float32 and float64.
#pragma once

#include "../../inr.h"
#include "winograd.h"

namespace inr {
namespace INR_ISA {

// Whether convolve_strided computes the convolution, in clearly fewer multiplications than the sum.
bool is_strided_winograd(Type type, const Conv2d& p);
// As conv2d and prepare_conv2d (inr.h), if is_strided_winograd.
Status convolve_strided(Type type, const Conv2d& p, void* out);
Status prepare_strided(Type type, const Conv2d& p, void* prepared, std::int64_t* size);

}  // namespace INR_ISA
}  // namespace inr
