"""RAFT's convex upsampling, `upsample_flow(flow, mask)`: a method of RAFT, RAFT-Stereo, GMA, FlowFormer, DocTr and
others, and a function that torchvision's RAFT calls.

flow [N, C, H, W], mask [N, 9 f f, H, W]: every pixel of the f times larger flow is a softmax-weighted mean of f times
the 3 x 3 flows around it. The factors f and channel counts C that a copy supports are found by running it.
"""

import dis
import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import class_swap, probe
from .class_swap import Adapter, Match, Unsupported, register
from .filter_dtypes import are_supported, filter_as_eager

NAME = "upsample_flow"
OURS = "inr_kernels.upsample_flow"  # a global of the calling module; not an identifier, so no code uses it
FACTORS = range(1, 17)
CHANNELS = range(1, 5)
DOES_NOT_RUN = "it takes no mask of 9 f² channels with a factor f from 1 to 16, or uses layers of the model"


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has a method upsample_flow, or its forward calls a function of that name."""
    return callable(getattr(type(module), NAME, None)) or _function(module) is not None


def verify(module: nn.Module) -> Match:
    """The match of one upsample_flow; Unsupported if it is not RAFT's."""
    if (function := _function(module)) is not None:
        return _verify_function(module, function)
    class_swap.check_method(module, NAME, [(("flow",), ("mask",))])
    supported = _compare(lambda: probe.without_weights(module, {}), lambda bare: bare.upsample_flow)
    return class_swap.match(module, _Method, NAME, supported)


def _verify_function(module: nn.Module, function: Callable[..., Any]) -> Match:
    """The match of a forward that calls upsample_flow(flow, up_mask), as torchvision's."""
    names = tuple(inspect.signature(function).parameters)
    if names != ("flow", "up_mask"):
        raise Unsupported(f"its function {NAME} takes ({', '.join(names)}), not (flow, up_mask)")
    if getattr(module, "mask_predictor", function) is None:
        raise Unsupported("it has no mask_predictor (raft_small): its flow is enlarged by bilinear interpolation")
    if "forward" in vars(module):
        raise Unsupported("forward is patched on the object")
    supported = _compare(nn.Module, lambda _: function)
    # The flags that forward reads need no check: only the function is replaced.
    return Match(_Caller, "forward", type(module).forward, (), (function, supported))


class _Supported(NamedTuple):
    """The factors and channel counts for which a copy of the method agrees with ours."""

    factors: tuple[int, ...]
    channels: tuple[int, ...]


def _function(module: nn.Module) -> Callable[..., Any] | None:
    """The function upsample_flow that the forward of the class calls, None if it calls none."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType):
        return None
    # An attribute of the name, such as a method, shares its entry in co_names.
    uses = {i.opname for i in dis.get_instructions(forward) if i.opcode in dis.hasname and i.argval == NAME}
    if uses != {"LOAD_GLOBAL"}:
        return None
    function = forward.__globals__.get(NAME)
    return function if isinstance(function, types.FunctionType) else None


def _calling(forward: types.FunctionType, ours: Callable[..., Any]) -> types.FunctionType:
    """The method, with the globals of its module, but calling ours where it calls NAME."""
    names, code = forward.__globals__, _renamed(forward.__code__)
    names[OURS] = ours
    made = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@functools.lru_cache(16)
def _renamed(code):
    return code.replace(co_names=tuple(OURS if name == NAME else name for name in code.co_names))


def _upsample_flow(function, supported, flow, up_mask=None):
    """Our upsample_flow, which calls the original function where ours does not serve."""
    if up_mask is None or not _fits(supported, flow, up_mask):
        return function(flow, up_mask)
    return _upsample(flow, up_mask, _factor(up_mask))


def _compare(make: Callable[[], nn.Module], method: Callable[[Any], Callable[..., Any]]) -> _Supported:
    """The factors and channels for which a method of the object that `make` returns agrees with ours.

    Raises:
        Unsupported: there are none.
    """
    reasons = {factor: _why_not(make, method, factor, 2) for factor in FACTORS}
    factors = tuple(factor for factor, reason in reasons.items() if not reason)
    if not factors:
        reason = min(reasons.values(), key=lambda reason: reason == DOES_NOT_RUN)
        raise Unsupported(f"upsample_flow is not RAFT's: {reason}")
    channels = tuple(count for count in CHANNELS if not _why_not(make, method, factors[0], count))
    return _Supported(factors, channels)


def _why_not(make, method, factor, channels):
    """Why the method differs from ours for this factor and channel count, "" if it does not."""
    try:
        problems = ((2, 4, 3, 1), (1, 1, 5, 30))
        return probe.first_reason(_why_different(make(), method, factor, channels, *problem) for problem in problems)
    except Exception:  # usually because the mask is for another factor
        return DOES_NOT_RUN


def _why_different(bare, method, factor, channels, batch, height, width, scale):
    """Why the method differs from ours on random numbers, without submodules; "" if it does not."""
    with probe.sandbox() as random:
        leaves = [random((batch, count, height, width), scale) for count in (channels, 9 * factor**2)]
        return probe.why_different(
            bare,
            lambda _: method(bare)(*leaves),
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


class _Method(class_swap.AcceleratedModule):
    def upsample_flow(self, flow, mask):
        """RAFT's method."""
        reason = class_swap.why_changed(self)
        if not reason and not _fits(self._inr_match.details, flow, mask):
            reason = class_swap.UNSUPPORTED_CALL
        if class_swap.falls_back(self, reason):
            return super().upsample_flow(flow, mask)
        return _upsample(flow, mask, _factor(mask))


class _Caller(class_swap.AcceleratedModule):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of torchvision's RAFT, with our upsample_flow."""
        if torch.compiler.is_compiling():  # torch.compile traces the original: ours is made at the call
            return super().forward(*args, **kwargs)
        forward: Any = self._inr_match.original
        function, supported = self._inr_match.details
        reason = class_swap.why_changed(self)
        if not reason and forward.__globals__.get(NAME) is not function:
            reason = f"its function {NAME} was replaced"
        if class_swap.falls_back(self, reason):
            return super().forward(*args, **kwargs)
        return _calling(forward, functools.partial(_upsample_flow, function, supported))(self, *args, **kwargs)


def _factor(mask: torch.Tensor) -> int:
    return math.isqrt(mask.shape[1] // 9)


def _fits(supported, flow, mask):
    return (
        are_supported(flow, mask)
        and (flow.dim(), mask.dim()) == (4, 4)
        and flow.shape[1] in supported.channels
        and _factor(mask) in supported.factors
        and mask.shape == (len(flow), 9 * _factor(mask) ** 2, *flow.shape[2:])
    )


ADAPTER = register(Adapter("RAFT's upsample_flow", is_candidate, verify, {"RAFT": (NAME,), "RAFTStereo": (NAME,)}))
