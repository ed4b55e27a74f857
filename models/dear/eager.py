"""DEAR's operations in plain PyTorch, as one writes them without kernels: what the kernels are held against."""

import math

from torch.nn import functional as F


def elementwise_filter(x, kernel, *, kernel_size, padding="zeros", normalize="none", alpha=0.0, beta=0.0, gamma=1.0):
    """`inr_kernels.elementwise_filter` by unfolding, without its strides, dilations and windows."""
    groups, radius = kernel.shape[1] // kernel_size**2, kernel_size // 2
    weights = kernel.softmax(1) if normalize == "all" else kernel
    weights = weights.unflatten(1, (groups, 1, -1))
    if normalize == "taps":
        weights = weights.softmax(3)
    padded = F.pad(x, [radius] * 4, mode="constant" if padding == "zeros" else padding)
    taps = F.unfold(padded, kernel_size).view(len(x), groups, -1, kernel_size**2, *x.shape[2:])
    return alpha * x + beta * taps.sum(3).flatten(1, 2) + gamma * (weights * taps).sum(3).flatten(1, 2)


def pixelwise_reconstruct(image, kernel):
    """`inr_kernels.elementwise_filter.pixelwise_reconstruct`."""
    return elementwise_filter(image, kernel, kernel_size=math.isqrt(kernel.shape[1]))


def unmask_attention(feat, mask, *, mask_keys=False):
    """`inr_kernels.unmask_attention` by scaled_dot_product_attention on every pixel."""
    keys, known = (x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for x in (feat, 1 - mask))
    seen = known.log().transpose(2, 3) if mask_keys else None  # a key counts by what is known of it
    out = F.scaled_dot_product_attention(known * keys, keys, keys, seen)
    return out.transpose(2, 3).reshape(feat.shape)
