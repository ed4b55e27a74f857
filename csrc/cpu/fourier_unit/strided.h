// 3 x 3 convolutions with stride 2 by Winograd's algorithm, for conv2d (strided.cpp).
#pragma once

#include "../../inr.h"
#include "../common/buffer.h"
#include "winograd.h"

namespace inr {
namespace INR_ISA {

// Whether convolve_strided computes the convolution, in clearly fewer multiplications than the sum.
template <class T>
bool is_strided_winograd(const Conv2d& p);
extern template bool is_strided_winograd<float>(const Conv2d&);
extern template bool is_strided_winograd<double>(const Conv2d&);

// out: [batch, outputs, out_height, out_width]
template <class T>
Status convolve_strided(const Conv2d& p, T* out);
extern template Status convolve_strided(const Conv2d&, float*);
extern template Status convolve_strided(const Conv2d&, double*);

// As prepare_conv2d.
template <class T>
Status prepare_strided(const Conv2d& p, T* prepared, std::int64_t* size);
extern template Status prepare_strided(const Conv2d&, float*, std::int64_t*);
extern template Status prepare_strided(const Conv2d&, double*, std::int64_t*);

}  // namespace INR_ISA
}  // namespace inr
