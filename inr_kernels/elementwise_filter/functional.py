"""The public functions of element-wise filtering: documentation, argument checks, autocast."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import (
    apply_autocast,
    is_positive_int,
    require,
    require_tensor,
    result_dtype,
    shape,
    without_autocast,
)

from . import op, reference
from .arguments import Arguments, Facts, check_kernel_size, check_options, check_tensors, check_window


def _facts(
    x: torch.Tensor, *args: Any, kernel_size: int | Sequence[int] = (0, 0), normalize: str = "none", **kwargs: Any
) -> Facts:
    """What decides on the backend of a call, of which `explain` may be given x only."""
    sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return Facts(x.device, result_dtype(x), math.prod(sides), normalize)


@op.OP.public(_facts)
def elementwise_filter(
    x: torch.Tensor,
    kernel: torch.Tensor,
    *,
    kernel_size: int | Sequence[int],
    groups: int | None = None,
    dilation: int | Sequence[int] = 1,
    stride: int = 1,
    upscale: int = 1,
    padding: str = "zeros",
    normalize: str = "none",
    alpha: float = 0.0,
    beta: float = 0.0,
    gamma: float = 1.0,
    log_window: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Filters every value of an image with its own kernel (cross-correlation, taps in row-major order).

        z_ij  = x[b, c, Y stride // upscale + (i - kh // 2) dilation, X stride // upscale + (j - kw // 2) dilation]
        w_ij  = kernel[b, g K² + i kw + j, Y, X],  g = c // (C / groups),  K² = kh kw;  or its softmax
        out[b, c, Y, X] = alpha z_centre + beta sum_ij z_ij + gamma sum_ij w_ij z_ij

    A coefficient of zero omits its term. (alpha, beta, gamma) = (0, 0, 1) filters; (2, 0, -1) with softmax adds a
    high-pass of x to x (DEAR); (1, 1, -1) is the "1 - softmax" that DEAR prints; (1, 0, -1) is only the high-pass.

    Args:
        x: [B, C, H, W], float32, float64, bfloat16 or float16 (half precision accumulates in float32).
        kernel: weights or logits [B, groups K², Ho, Wo] in x's dtype, any strides: pass [B, Ho, Wo, kh, kw] as
            `kernel.permute(0, 3, 4, 1, 2).flatten(1, 2)`, without a copy. Ho = ceil(H upscale / stride), Wo likewise.
        kernel_size: K or (kh, kw), odd.
        groups: number of kernels per pixel, a divisor of C; None: kernel's channels / K².
        dilation: distance of the taps in pixels; a tuple, e.g. (1, 2, 3), filters with the same kernel at each
            dilation and returns the stack.
        stride, upscale: of the output's grid, as in the formula.
        padding: the values outside x: "zeros", "replicate" or "reflect" (the border is not repeated; sides must be
            longer than the reach K // 2 dilation); "valid": no padding, H and W shrink by (K - 1) dilation (only with
            a single dilation).
        normalize: "none"; "taps": softmax over the K² taps; "all": over all groups K² channels together.
        alpha, beta, gamma: coefficients of x, the box sum and the filtered x.
        log_window: [kh, kw], added to the logits before the softmax: log of a window on the weights. A constant: it
            gets no gradient.
        backend: "reference", "cpu", "triton", "cuda" (C++; the backward of some calls is Triton's); None: the first in
            the table that can run (see `inr_kernels.explain`).

    Returns:
        [B, C, Ho, Wo], or [len(dilation), B, C, Ho, Wo] for a tuple of dilations, in x's dtype (autocast's, under
        autocast).

    Gradients reach x and kernel, deterministically; only those that are needed are computed, and only x and kernel are
    saved for them. Second derivatives need `backend="reference"`; forward-mode differentiation and torch.func use it.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message gives the reason.

    Source: Guo et al., JPGNet (ACM MM 2021); Li, Guo et al., MISF (CVPR 2022); Zhang, Guo et al., SuperInpaint (DEAR,
    2023), eq. 3-4 and 8. Other instances: FAC (Zhou et al., ICCV 2019), CARAFE (Wang et al., ICCV 2019), involution (Li
    et al., CVPR 2021), convex upsampling (RAFT, Teed and Deng, ECCV 2020).

    Example:
        >>> import torch
        >>> x, logits = torch.randn(1, 8, 5, 7), torch.randn(1, 8 * 9, 5, 7)
        >>> elementwise_filter(x, logits, kernel_size=3, normalize="taps", alpha=2, gamma=-1).shape
        torch.Size([1, 8, 5, 7])
    """
    check_tensors(x, kernel)
    kernel_size = check_kernel_size(kernel_size)
    dilations = check_options(dilation, stride, upscale, padding, normalize)
    groups = _check_groups(groups, x, kernel, kernel_size)
    check_window(log_window, x, kernel_size, normalize)
    requested = dispatch.reference_if_transformed(dispatch.requested_backend(backend), x, kernel)
    x, kernel = apply_autocast(x, kernel)
    alpha, beta, gamma = float(alpha), float(beta), float(gamma)
    options = stride, upscale, padding, normalize, alpha, beta, gamma
    arguments = Arguments(x, kernel, kernel_size, groups, dilations, *options, log_window)
    with without_autocast(x):  # already applied
        if requested == "reference":
            arguments.check()  # the op checks its arguments itself
            out = reference.elementwise_filter(*arguments)
        else:
            out = op.elementwise_filter(*arguments, requested)
    return out.squeeze(0) if isinstance(dilation, int) else out


def pixelwise_reconstruct(image: torch.Tensor, kernel: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Replaces every pixel by a weighted sum of its K x K neighbours, the same for all channels, with zero padding.

        out[b, c, p] = sum_q kernel[b, q, p] image[b, c, p + offset(q)],  q = 0 ... K² - 1 in row-major order

    Args:
        image: [B, C, H, W], in a dtype that `elementwise_filter` takes.
        kernel: [B, K², H, W], K odd.
        backend: see `elementwise_filter`.

    Returns:
        [B, C, H, W]. Errors and gradients: see `elementwise_filter`.

    Source: Zhang, Guo et al., SuperInpaint (DEAR), 2023, eq. 8.

    Example:
        >>> import torch
        >>> pixelwise_reconstruct(torch.rand(1, 3, 6, 7), torch.rand(1, 9, 6, 7)).shape
        torch.Size([1, 3, 6, 7])
    """
    for value, name in ((image, "image"), (kernel, "kernel")):
        require_tensor(value, name, dims=(4,))
    side = math.isqrt(kernel.shape[1])
    require(side * side == kernel.shape[1] and side % 2, "kernel", "have K² channels, K odd", shape(kernel))
    return elementwise_filter(image, kernel, kernel_size=side, groups=1, backend=backend)


def _check_groups(groups, x, kernel, kernel_size):
    """The number of groups; None: as many as kernel has channels for."""
    taps, channels = kernel_size[0] * kernel_size[1], kernel.shape[1]
    if groups is None:
        rule = f"have groups x {taps} channels (kernel_size {kernel_size[0]} x {kernel_size[1]})"
        require(channels and channels % taps == 0, "kernel", rule, shape(kernel))
        return channels // taps
    groups = int(groups) if isinstance(groups, torch.Tensor) else groups  # a size under torch.jit.trace
    require(is_positive_int(groups), "groups", f"divide x's {x.shape[1]} channels", groups)
    return groups
