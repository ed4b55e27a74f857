"""RAFT's convex upsampling, the method `upsample_flow(flow, mask)` of RAFT, RAFT-Stereo, GMA, FlowFormer, DocTr, ...

flow [N, C, H, W], mask [N, 9 f f, H, W]: every pixel of the f times larger flow is a softmax-weighted mean of f times
the 3 x 3 flows around it. f, and which C a copy takes, are what it computes as we do for random numbers.
"""

import math
from typing import NamedTuple

from . import class_swap, probe
from .filter_dtypes import are_filterable, filtered

WHAT = "RAFT's upsample_flow"
FACTORS = range(1, 17)
CHANNELS = range(1, 5)


def is_candidate(module):
    """Whether it deserves a word in the log: it has a method upsample_flow."""
    return callable(getattr(type(module), "upsample_flow", None))


def replace(module):
    """Accelerates one model's upsample_flow, in place. Returns why it was left alone, "" if it was not."""
    return class_swap.attempt(module, _verify)


class _Runs(NamedTuple):
    """What a copy of the method takes."""

    factors: tuple
    channels: tuple


def _verify(module):
    if class_swap.signature(type(module), "upsample_flow") != (("flow",), ("mask",)):
        raise class_swap.LeftAlone("upsample_flow does not take (flow, mask)")
    if "upsample_flow" in vars(module):
        raise class_swap.LeftAlone("upsample_flow is patched on the object")
    reasons = {factor: _why_not(module, factor, 2) for factor in FACTORS}
    factors = tuple(factor for factor, reason in reasons.items() if not reason)
    if not factors:
        reason = min(reasons.values(), key=lambda reason: reason.startswith("it raised"))
        raise class_swap.LeftAlone(f"upsample_flow is not RAFT's: {reason}")
    channels = tuple(count for count in CHANNELS if not _why_not(module, factors[0], count))
    return _Upsampling, class_swap.verdict(module, "upsample_flow", _Runs(factors, channels))


def _why_not(module, factor, channels):
    """Why upsample_flow does not run as ours with these, "" if it does."""
    try:
        return probe.first(_differs(module, factor, channels, *problem) for problem in ((2, 4, 3, 1), (1, 1, 5, 30)))
    except Exception as error:  # a mask for another factor, mostly
        return f"it raised {type(error).__name__}: {error}".splitlines()[0]


def _differs(module, factor, channels, batch, height, width, scale):
    """Why upsample_flow is not ours, "" if on random numbers it is; in float32 on the CPU, without its submodules."""
    with probe.quiet_and_plain() as random:
        leaves = [random((batch, count, height, width), scale) for count in (channels, 9 * factor**2)]
        shell = probe.shell(module, {})
        return probe.differs(
            shell,
            lambda _: shell.upsample_flow(*leaves),
            lambda _: _upsample(*leaves, factor, "reference"),
            leaves,
            random,
        )


def _upsample(flow, mask, factor, backend=None):
    """RAFT's output. A tap's f² logits are planes f² apart in all images: these f² are the batch, images are groups."""
    batch, channels, height, width = flow.shape
    logits = mask.unflatten(1, (9, factor**2)).flatten(0, 1).transpose(0, 1)
    windows = (factor * flow).flatten(0, 1).expand(factor**2, -1, -1, -1)
    out = filtered(windows, logits, kernel_size=3, groups=batch, normalize="taps", backend=backend)
    out = out.view(factor, factor, batch, channels, height, width).permute(2, 3, 4, 0, 5, 1)
    return out.reshape(batch, channels, factor * height, factor * width)


class _Upsampling(class_swap.Accelerated):
    _inr_replace = staticmethod(replace)

    def upsample_flow(self, flow, mask):
        """RAFT's."""
        reason, factor = class_swap.why_changed(self), _factor(flow, mask, self._inr_verdict.found)
        if not reason and not factor:
            reason = "the arguments of a call fit neither each other nor RAFT"
        if reason:
            class_swap.as_before(self, reason)
            return super().upsample_flow(flow, mask)
        return _upsample(flow, mask, factor)


def _factor(flow, mask, runs):
    """The factor of a call, 0 if it is not one of those that were verified."""
    if not are_filterable(flow, mask) or (flow.dim(), mask.dim()) != (4, 4) or flow.shape[1] not in runs.channels:
        return 0
    factor = math.isqrt(mask.shape[1] // 9)
    fits = mask.shape == (len(flow), 9 * factor**2, *flow.shape[2:]) and factor in runs.factors
    return factor if fits else 0
