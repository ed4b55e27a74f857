"""DEAR's operations in plain PyTorch, as written without this package's kernels; `DEAR(eager=True)` uses them."""

import math

import torch
from torch.nn import functional as F


def elementwise_filter(
    x: torch.Tensor,
    kernel: torch.Tensor,
    *,
    kernel_size: int,
    padding: str = "zeros",
    normalize: str = "none",
    alpha: float = 0.0,
    beta: float = 0.0,
    gamma: float = 1.0,
) -> torch.Tensor:
    """`inr_kernels.elementwise_filter` by unfolding, with stride and dilation 1.

    x [B, C, H, W], kernel [B, G kernel_size², H, W] -> [B, C, H, W].
    """
    groups, radius = kernel.shape[1] // kernel_size**2, kernel_size // 2
    weights = kernel.softmax(1) if normalize == "all" else kernel
    weights = weights.unflatten(1, (groups, 1, -1))
    if normalize == "taps":
        weights = weights.softmax(3)
    padded = F.pad(x, [radius] * 4, mode="constant" if padding == "zeros" else padding)
    taps = F.unfold(padded, kernel_size).view(len(x), groups, -1, kernel_size**2, *x.shape[2:])
    return alpha * x + beta * taps.sum(3).flatten(1, 2) + gamma * (weights * taps).sum(3).flatten(1, 2)


def pixelwise_reconstruct(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """`inr_kernels.pixelwise_reconstruct`: image [B, C, H, W], kernel [B, K², H, W] -> [B, C, H, W]."""
    return elementwise_filter(image, kernel, kernel_size=math.isqrt(kernel.shape[1]))


def unmask_attention(feat: torch.Tensor, mask: torch.Tensor, *, mask_keys: bool = False) -> torch.Tensor:
    """`inr_kernels.unmask_attention` by scaled_dot_product_attention over all pixels.

    feat [B, C, H, W], mask [B, 1, H, W] -> [B, C, H, W].
    """
    keys, known = (x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for x in (feat, 1 - mask))
    seen = known.log().transpose(2, 3) if mask_keys else None  # each key is weighted by 1 - mask
    out = F.scaled_dot_product_attention(known * keys, keys, keys, seen)
    return out.transpose(2, 3).reshape(feat.shape)
