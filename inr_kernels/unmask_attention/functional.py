"""Unmask attention: the contract, the checks, autocast."""

import math

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import require, require_tensor, result_dtype, shape

from . import op, reference


def unmask_attention(feat, mask, *, scale=None, mask_keys=False, backend=None):
    """Rebuilds every pixel's feature from those of all pixels, by how much they resemble it; a hole's from all alike.

        E = softmax((1 - M) F F^T scale) F,  F [N, C] the pixels' features, M [N] the mask; softmax along a row

    A pixel with M = 1 has no scores: it gets the mean of F, exactly, and costs nothing. So the time is that of the
    pixels outside the hole. No kernel holds an N x N matrix: memory is O(N C), in the backward too. The
    reference, which also gives the gradient of a mask and torch.func's transforms, does.

    Args:
        feat: F, [B, C, H, W], float32, float64, bfloat16 or float16 (half precision accumulates in float32).
        mask: M, [B, 1, H, W], 1 = hole, 0 = known, or between; any dtype. Values are clamped to [0, 1].
        scale: of the scores; None: 1 / sqrt(C).
        mask_keys: whether holes are no keys either: a pixel then weighs 1 - M in the softmax (eq. 7 masks the queries
            alone). An image that is all hole gives zeros.
        backend: "reference", "cpu", "triton"; None: the fastest that can run (see `inr_kernels.explain`).

    Returns:
        E, [B, C, H, W], contiguous, in feat's dtype (autocast's, under autocast).

    Gradients reach feat, deterministically; beside feat and mask, E and two numbers a pixel are kept for them. Those of
    a mask that requires them, and second derivatives, come from the reference.

    Raises:
        TypeError: feat is no floating-point tensor, or mask no real tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the wished backend cannot run here, and why.

    Source: DEAR (SuperInpaint), eq. 6-7.

    Example:
        >>> import torch
        >>> feat, mask = torch.randn(1, 8, 5, 7), (torch.rand(1, 1, 5, 7) < 0.4)
        >>> unmask_attention(feat, mask).shape
        torch.Size([1, 8, 5, 7])
    """
    check_tensors(feat, mask)
    require(isinstance(mask_keys, bool), "mask_keys", "be a bool", repr(mask_keys))
    scale = check_scale(scale, feat.shape[1])
    dtype = result_dtype(feat)
    wish = dispatch.wished(backend)
    with torch.autocast(feat.device.type, enabled=False):  # the dtypes are settled
        tokens = feat.to(dtype).flatten(2)
        weight = 1 - mask.to(torch.float64 if dtype == torch.float64 else torch.float32).flatten(1).clamp(0, 1)
        wish = dispatch.settle_wish(wish, feat, mask)
        needs_mask = torch.is_grad_enabled() and weight.requires_grad
        if needs_mask and wish not in ("", "reference"):
            raise RuntimeError(f"backend {wish!r} has no gradient for mask; the reference has")
        if needs_mask or wish == "reference":
            out = reference.unmask_attention(tokens, weight, scale, mask_keys)[0]
        else:
            out = op.unmask_attention(tokens, weight, scale, mask_keys, wish)[0]
    return out.reshape(feat.shape)


def check_tensors(feat, mask):
    """A feature map and a mask of its size."""
    require_tensor(feat, "feat", dims=(4,))
    require(min(feat.shape[1:]) > 0, "feat", "have at least one channel and one pixel, [B, C, H, W]", shape(feat))
    if not isinstance(mask, torch.Tensor) or mask.is_complex():
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a real torch.Tensor; got {got}")
    expected = [len(feat), 1, *feat.shape[2:]]
    require(list(mask.shape) == expected, "mask", f"have shape {expected} for feat {shape(feat)}", shape(mask))
    require(mask.device == feat.device, "mask", f"be on {feat.device}", mask.device)


def check_scale(scale, channels):
    """The scale as a float."""
    if scale is None:
        return 1 / math.sqrt(channels)
    fits = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
    require(fits, "scale", "be a finite number or None", repr(scale))
    return float(scale)


def _facts(feat=None, *args, **kwargs):
    """What `explain` needs to know of a call."""
    if feat is None:
        return op.Facts(torch.device("cpu"), torch.float32)
    return op.Facts(feat.device, result_dtype(feat), feat.shape[1])


dispatch.register(
    dispatch.Op(
        name="unmask_attention",
        function=unmask_attention,
        facts=_facts,
        # Triton only at a wish, until the test suite has passed on a GPU.
        backends={"cpu": op.why_not_cpu, "reference": lambda facts: "", "triton": op.why_not_triton},
    )
)
