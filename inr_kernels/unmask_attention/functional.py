"""The public function of unmask attention: documentation, argument checks, autocast."""

import math
from typing import Any

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import require, require_tensor, result_dtype, shape, without_autocast

from . import op, reference
from .arguments import Arguments, Facts, statistics_dtype


def _facts(feat: torch.Tensor, *args: Any, **kwargs: Any) -> Facts:
    """What decides on the backend of a call, of which `explain` may be given feat only."""
    return Facts(feat.device, result_dtype(feat), feat.shape[1])


@op.OP.public(_facts)
def unmask_attention(
    feat: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None = None,
    mask_keys: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Replaces every pixel's feature by an average of all features, weighted by their similarity to it.

        E = softmax((1 - M) F F^T scale) F,  F [N, C] the pixels' features, M [N] the mask; softmax along a row

    A pixel with M = 1 has only zero scores: it gets the mean of F, exactly, and its attention is not computed, so the
    time depends on the number of unmasked pixels. NaN or infinity in F reaches such a pixel through that mean only, in
    the channels that hold it; with `mask_keys`, what masked pixels hold reaches no pixel. Memory is O(N C), in the
    backward too: no backend stores an N x N matrix. Only the form that gives the gradient of a mask and supports
    torch.func stores it.

    Args:
        feat: F, [B, C, H, W], float32, float64, bfloat16 or float16 (half precision accumulates in float32).
        mask: M, [B, 1, H, W], 1 = hole, 0 = known, or between; any real dtype. Values are clamped to [0, 1].
        scale: factor of the scores; None: 1 / sqrt(C).
        mask_keys: whether masked pixels are excluded as keys too: a pixel then has the weight 1 - M in the softmax
            (eq. 7 masks only the queries). A fully masked image gives zeros.
        backend: "reference", "cpu", "triton", "sdpa" (torch's fused attention, on a GPU in half precision); None: the
            first in the table that can run (see `inr_kernels.explain`).

    Returns:
        E, [B, C, H, W], contiguous, in feat's dtype (autocast's, under autocast).

    Gradients reach feat, deterministically; for them, E and two numbers a pixel are saved in addition to feat and mask.
    The gradient of a mask that requires it, and second derivatives, come from the reference.

    Raises:
        TypeError: feat is no floating-point tensor, or mask no real tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message gives the reason.

    Source: Zhang, Guo et al., SuperInpaint (DEAR), 2023, eq. 6-7.

    Example:
        >>> import torch
        >>> feat, mask = torch.randn(1, 8, 5, 7), (torch.rand(1, 1, 5, 7) < 0.4)
        >>> unmask_attention(feat, mask).shape
        torch.Size([1, 8, 5, 7])
    """
    _check_tensors(feat, mask)
    require(isinstance(mask_keys, bool), "mask_keys", "be a bool", repr(mask_keys))
    scale = _check_scale(scale, feat.shape[1])
    requested = dispatch.reference_if_transformed(dispatch.requested_backend(backend), feat, mask)
    dtype = result_dtype(feat)
    with without_autocast(feat):  # applied here
        tokens = feat.to(dtype).flatten(2)
        weight = 1 - mask.to(statistics_dtype(dtype)).flatten(1).clamp(0, 1)
        arguments = Arguments(tokens, weight, scale, mask_keys)
        needs_mask = torch.is_grad_enabled() and weight.requires_grad
        if needs_mask and requested not in ("", "reference"):
            raise RuntimeError(f"backend {requested!r} does not compute the gradient of mask; use backend='reference'")
        if needs_mask or requested == "reference":
            out, _ = reference.unmask_attention(*arguments)
        else:
            out, _ = op.unmask_attention(*arguments, requested)
    return out.reshape(feat.shape)


def _check_tensors(feat, mask):
    """Raises unless feat is a feature map and mask a mask of its size."""
    require_tensor(feat, "feat", dims=(4,))
    require(min(feat.shape[1:]) > 0, "feat", "have at least one channel and one pixel, [B, C, H, W]", shape(feat))
    require_tensor(mask, "mask", like=feat, integers=True)
    expected = [len(feat), 1, *feat.shape[2:]]
    require(list(mask.shape) == expected, "mask", f"have shape {expected} for feat {shape(feat)}", shape(mask))


def _check_scale(scale, channels):
    """The scale as a float."""
    if scale is None:
        return 1 / math.sqrt(channels)
    fits = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
    require(fits, "scale", "be a finite number or None", repr(scale))
    return float(scale)
