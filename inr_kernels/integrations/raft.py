"""RAFT's convex upsampling, the method `upsample_flow(flow, mask)` of RAFT, RAFT-Stereo, GMA, FlowFormer, DocTr, ...

flow [N, C, H, W], mask [N, 9 f f, H, W]: every pixel of the f times larger flow is a softmax-weighted mean of f times
the 3 x 3 flows around it. The factors f and channel counts C that a copy supports are found by running it.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from . import class_swap, probe
from .class_swap import Adapter, Match, Unsupported, register
from .filter_dtypes import are_supported, filter_as_eager

FACTORS = range(1, 17)
CHANNELS = range(1, 5)


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has a method upsample_flow."""
    return callable(getattr(type(module), "upsample_flow", None))


class _Supported(NamedTuple):
    """What a copy of the method agrees with ours for."""

    factors: tuple[int, ...]
    channels: tuple[int, ...]


def verify(module: nn.Module) -> Match:
    """The match of one upsample_flow; Unsupported if it is not RAFT's."""
    class_swap.check_method(module, "upsample_flow", [(("flow",), ("mask",))])
    reasons = {factor: _why_not(module, factor, 2) for factor in FACTORS}
    factors = tuple(factor for factor, reason in reasons.items() if not reason)
    if not factors:
        reason = min(reasons.values(), key=lambda reason: reason.startswith("it raised"))
        raise Unsupported(f"upsample_flow is not RAFT's: {reason}")
    channels = tuple(count for count in CHANNELS if not _why_not(module, factors[0], count))
    return class_swap.match(module, _Upsampling, "upsample_flow", _Supported(factors, channels))


def _why_not(module, factor, channels):
    """Why upsample_flow differs from ours for this factor and channel count, "" if it does not."""
    try:
        problems = ((2, 4, 3, 1), (1, 1, 5, 30))
        return probe.first_reason(_why_different(module, factor, channels, *problem) for problem in problems)
    except Exception as error:  # usually because the mask is for another factor
        return f"it raised {type(error).__name__}: {error}".splitlines()[0]


def _why_different(module, factor, channels, batch, height, width, scale):
    """Why upsample_flow differs from ours on random numbers, without its submodules; "" if it does not."""
    with probe.sandbox() as random:
        leaves = [random((batch, count, height, width), scale) for count in (channels, 9 * factor**2)]
        bare = probe.without_weights(module, {})
        return probe.why_different(
            bare,
            lambda _: bare.upsample_flow(*leaves),
            lambda _: _upsample(*leaves, factor, "reference"),
            leaves,
            random,
        )


def _upsample(flow, mask, factor, backend=None):
    """RAFT's output. A sub-pixel's 9 taps are f² planes apart: the batch is the sub-pixels, the groups are images."""
    batch, channels, height, width = flow.shape
    logits = mask.unflatten(1, (9, factor**2)).flatten(0, 1).transpose(0, 1)
    windows = (factor * flow).flatten(0, 1).expand(factor**2, -1, -1, -1)
    out = filter_as_eager(windows, logits, kernel_size=3, groups=batch, normalize="taps", backend=backend)
    out = out.view(factor, factor, batch, channels, height, width).permute(2, 3, 4, 0, 5, 1)
    return out.reshape(batch, channels, factor * height, factor * width)


class _Upsampling(class_swap.AcceleratedModule):
    def upsample_flow(self, flow, mask):
        """RAFT's method."""
        if class_swap.falls_back(self, _why_not_this_call(self, flow, mask)):
            return super().upsample_flow(flow, mask)
        return _upsample(flow, mask, _factor(mask))


def _factor(mask: torch.Tensor) -> int:
    return math.isqrt(mask.shape[1] // 9)


def _why_not_this_call(module, flow, mask):
    if reason := class_swap.why_changed(module):
        return reason
    factors, channels = module._inr_match.details
    fits = (
        are_supported(flow, mask)
        and (flow.dim(), mask.dim()) == (4, 4)
        and flow.shape[1] in channels
        and _factor(mask) in factors
        and mask.shape == (len(flow), 9 * _factor(mask) ** 2, *flow.shape[2:])
    )
    return "" if fits else class_swap.UNSUPPORTED_CALL


ADAPTER = register(Adapter("RAFT's upsample_flow", is_candidate, verify))
