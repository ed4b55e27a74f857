"""Element-wise filtering: the contract, the checks, autocast."""

import math

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.backends import Facts
from inr_kernels._core.checks import require, require_tensor, result_dtype, shape

from . import op, reference

PADDINGS = ("zeros", "replicate", "reflect", "valid")
NORMALIZATIONS = ("none", "taps", "all")


def elementwise_filter(
    x,
    kernel,
    *,
    kernel_size,
    groups=None,
    dilation=1,
    stride=1,
    upscale=1,
    padding="zeros",
    normalize="none",
    alpha=0.0,
    beta=0.0,
    gamma=1.0,
    log_window=None,
    backend=None,
):
    """Filters every value of an image with a kernel of its own (cross-correlation, taps row by row).

        z_ij  = x[b, c, Y stride // upscale + (i - kh // 2) dilation, X stride // upscale + (j - kw // 2) dilation]
        w_ij  = kernel[b, g K² + i kw + j, Y, X],  g = c // (C / groups),  K² = kh kw;  or its softmax
        out[b, c, Y, X] = alpha z_centre + beta sum_ij z_ij + gamma sum_ij w_ij z_ij

    A coefficient of zero omits its term. (0, 0, 1) filters; (2, 0, -1) with softmax adds a high-pass to x (DEAR);
    (1, 1, -1) is its literal "1 - softmax"; (1, 0, -1) is the high-pass alone.

    Args:
        x: [B, C, H, W], float32, float64, bfloat16 or float16 (half precision accumulates in float32).
        kernel: weights or logits [B, groups K², Ho, Wo] in x's dtype, any strides: [B, Ho, Wo, kh, kw] comes as
            `kernel.permute(0, 3, 4, 1, 2).flatten(1, 2)`, without a copy. Ho = ceil(H upscale / stride), Wo likewise.
        kernel_size: K or (kh, kw), odd.
        groups: how many kernels a pixel has, a divisor of C; None: kernel's channels / K².
        dilation: distance of the taps in pixels; several, (1, 2, 3), filter with the same kernel and give the stack.
        stride, upscale: of the output's grid, as in the formula.
        padding: what lies outside x: "zeros", "replicate" or "reflect" (without the border itself; needs sides longer
            than the reach K // 2 dilation); "valid": nothing, x is padded by the caller and H, W shrink by
            (K - 1) dilation (then one dilation).
        normalize: "none"; "taps": softmax over the K² taps; "all": over all groups K² channels together.
        alpha, beta, gamma: coefficients of x, the box sum and the filtered x.
        log_window: [kh, kw], added to the logits before the softmax: log of a window on the weights. A constant.
        backend: "reference", "cpu", "triton"; None: the fastest that can run (see `inr_kernels.explain`).

    Returns:
        [B, C, Ho, Wo], or [len(dilation), B, C, Ho, Wo] for a tuple of dilations, in x's dtype (autocast's, under
        autocast).

    Gradients reach x and kernel, only those asked for, deterministically; nothing but x and kernel is kept for them.
    A second derivative comes through `backend="reference"`; forward-mode differentiation and torch.func take it.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the wished backend cannot run here, and why.

    Source: Guo et al., JPGNet (ACM MM 2021) and MISF (CVPR 2022); DEAR's eq. 3-4 and 8. Other instances: FAC (Zhou
    et al., ICCV 2019), CARAFE (Wang et al., ICCV 2019), involution (Li et al., CVPR 2021), RAFT's convex upsampling.

    Example:
        >>> import torch
        >>> x, logits = torch.randn(1, 8, 5, 7), torch.randn(1, 8 * 9, 5, 7)
        >>> elementwise_filter(x, logits, kernel_size=3, normalize="taps", alpha=2, gamma=-1).shape
        torch.Size([1, 8, 5, 7])
    """
    kernel_size = check_kernel_size(kernel_size)
    dilations = check_positive_list(dilation, "dilation")
    for value, name in ((stride, "stride"), (upscale, "upscale")):
        require(_positive(value), name, "be a positive integer", repr(value))
    require(padding in PADDINGS, "padding", f"be one of {', '.join(PADDINGS)}", repr(padding))
    require(normalize in NORMALIZATIONS, "normalize", f"be one of {', '.join(NORMALIZATIONS)}", repr(normalize))
    groups = check_tensors(x, kernel, kernel_size, groups)
    check_size(x, kernel, kernel_size, dilations, stride, upscale, padding)
    check_window(log_window, x, kernel_size, normalize)
    dtype = result_dtype(x)
    if dtype == x.dtype and not torch.is_autocast_enabled(x.device.type):
        require(kernel.dtype == dtype, "kernel", f"have x's dtype {dtype}", kernel.dtype)
    form = kernel_size, groups, dilations, stride, upscale, padding, normalize
    form += (*map(float, (alpha, beta, gamma)), log_window)
    wish = dispatch.settle_wish(dispatch.wished(backend), x, kernel)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are settled
        x, kernel = x.to(dtype), kernel.to(dtype)
        if wish == "reference":
            out = reference.elementwise_filter(x, kernel, *form)
        else:
            out = op.elementwise_filter(x, kernel, *form, wish)
    return out.squeeze(0) if isinstance(dilation, int) else out


def pixelwise_reconstruct(image, kernel, *, backend=None):
    """Rebuilds every pixel from its K x K neighbourhood, with one kernel for all its channels (zeros outside).

        out[b, c, p] = sum_q kernel[b, q, p] image[b, c, p + offset(q)],  q = 0 ... K² - 1, row by row

    Args:
        image: [B, C, H, W], any dtype of `elementwise_filter`.
        kernel: [B, K², H, W], K odd.
        backend: as `elementwise_filter`.

    Returns:
        [B, C, H, W]. Errors and gradients: as `elementwise_filter`.

    Source: DEAR (SuperInpaint), eq. 8.

    Example:
        >>> import torch
        >>> pixelwise_reconstruct(torch.rand(1, 3, 6, 7), torch.rand(1, 9, 6, 7)).shape
        torch.Size([1, 3, 6, 7])
    """
    require_tensor(kernel, "kernel", dims=(4,))
    side = math.isqrt(kernel.shape[1])
    require(side * side == kernel.shape[1] and side % 2, "kernel", "have K² channels, K odd", shape(kernel))
    return elementwise_filter(image, kernel, kernel_size=side, groups=1, backend=backend)


def _positive(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_positive_list(value, name):
    """A positive integer or a sequence of them, as a tuple."""
    values = (value,) if isinstance(value, int) else value
    fits = isinstance(values, (tuple, list)) and len(values) > 0 and all(map(_positive, values))
    require(fits, name, "be a positive integer or a tuple of them", repr(value))
    return tuple(values)


def check_kernel_size(kernel_size):
    """(kh, kw), both odd."""
    sides = check_positive_list(kernel_size, "kernel_size")
    sides = sides * 2 if len(sides) == 1 else sides
    fits = len(sides) == 2 and all(n % 2 for n in sides)
    require(fits, "kernel_size", "be K or (kh, kw), both odd", repr(kernel_size))
    return sides


def check_tensors(x, kernel, kernel_size, groups):
    """Tensors that fit each other; returns the number of groups."""
    require_tensor(x, "x", dims=(4,))
    require(min(x.shape[1:]) > 0, "x", "have at least one channel and one pixel, [B, C, H, W]", shape(x))
    require_tensor(kernel, "kernel", dims=(4,), like=x)
    require(len(kernel) == len(x), "kernel", f"have x's batch of {len(x)}", shape(kernel))
    (kh, kw), channels = kernel_size, kernel.shape[1]
    if groups is None:
        rule = f"have groups x {kh * kw} channels (kernel_size {kh} x {kw})"
        require(channels and channels % (kh * kw) == 0, "kernel", rule, shape(kernel))
        groups = channels // (kh * kw)
    require(_positive(groups) and x.shape[1] % groups == 0, "groups", f"divide x's {x.shape[1]} channels", groups)
    rule = f"have {groups} groups x {kh * kw} = {groups * kh * kw} channels"
    require(channels == groups * kh * kw, "kernel", rule, shape(kernel))
    return groups


def check_size(x, kernel, kernel_size, dilations, stride, upscale, padding):
    """Sides long enough for the padding, and a kernel of the output's size."""
    reach = [n // 2 * max(dilations) for n in kernel_size]
    sides = list(x.shape[2:])
    if padding == "valid":
        require(len(dilations) == 1, "dilation", "be a single one with padding='valid'", dilations)
        sides = [side - 2 * r for side, r in zip(sides, reach, strict=True)]
        require(min(sides) > 0, "x", f"be larger than {[2 * r for r in reach]} with padding='valid'", shape(x))
    if padding == "reflect":
        fits = all(side > r for side, r in zip(sides, reach, strict=True))
        require(fits, "x", f"have sides longer than the reach {reach} with padding='reflect'", shape(x))
    expected = [-(-side * upscale // stride) for side in sides]
    require(list(kernel.shape[2:]) == expected, "kernel", f"have the output's size {expected}", shape(kernel))


def check_window(log_window, x, kernel_size, normalize):
    """None, or a constant [kh, kw] for a softmax."""
    if log_window is None:
        return
    require_tensor(log_window, "log_window", dims=(2,), like=x)
    fits = tuple(log_window.shape) == kernel_size
    require(fits, "log_window", f"have shape {list(kernel_size)}", shape(log_window))
    require(normalize != "none", "log_window", "be None without a softmax (normalize='none')", "a tensor")
    require(not log_window.requires_grad, "log_window", "be a constant", "a tensor that requires a gradient")


def _facts(x=None, *args, **kwargs):
    """What `explain` needs to know of a call."""
    if x is None:
        return Facts(torch.device("cpu"), torch.float32)
    return Facts(x.device, result_dtype(x))


dispatch.register(
    dispatch.Op(
        name="elementwise_filter",
        function=elementwise_filter,
        facts=_facts,
        # Triton only at a wish, until the test suite has passed on a GPU.
        backends={"cpu": op.why_not_cpu, "reference": lambda facts: "", "triton": op.why_not_triton},
    )
)
