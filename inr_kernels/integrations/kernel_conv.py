"""KernelConv of MISF, EfficientDeRain(+), JPGNet, and of the KPN that they took it from.

frames [B, N, H, W], core [B, N K², H, W]; or frames [B, N, colours, H, W], core [B, (N K²) colours, H, W], where the
taps come before the colours. The output is `elementwise_filter`'s with dilation `rate`, divided by `white_level`.
"""

import math

from torch import nn

from . import class_swap, probe
from .class_swap import Adapter, Match, Unsupported, register
from .filter_dtypes import are_supported, filter_as_eager

ATTRIBUTES = ("kernel_size", "sep_conv", "core_bias")
# How copies return the output: without axes of length one, with the mean over axis 1 (KPN); the same alone; unchanged.
FORMS = ("pair", "squeezed", "plain")
# Frames' shape, white_level (None: the defaults), rate. Copies differ for large batches and for axes of length one.
PROBLEMS = [
    ((2, 3, 5, 4), None, 1),
    ((1, 3, 1, 4), 2.0, 3),
    ((11, 1, 3, 4), 0.5, 2),
    ((2, 2, 3, 4, 5), None, 1),
    ((1, 2, 1, 5, 4), 2.0, 2),
]


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has KernelConv's attributes."""
    return all(hasattr(module, name) for name in ATTRIBUTES)


def verify(module: nn.Module) -> Match:
    """The match of one KernelConv; Unsupported if it is not one of the known forms."""
    signature = class_swap.check_method(module, "forward", _MIXINS)
    if reason := _why_not(module):
        raise Unsupported(reason)
    for form in FORMS:
        reason = probe.first_reason(_why_different(module, form, len(signature) == 4, *problem) for problem in PROBLEMS)
        if not reason:
            return class_swap.match(module, _MIXINS[signature], "forward", form)
    raise Unsupported(f"forward is not KernelConv's: {reason}")


def _why_not(module):
    """Why the options are not supported, "" if they are."""
    if module.sep_conv:
        return "its kernels are separable (sep_conv)"
    if module.core_bias:
        return "its kernels have a bias (core_bias)"
    sizes = module.kernel_size
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 1 or type(sizes[0]) is not int or sizes[0] % 2 != 1:
        return f"kernel_size must be a list of one odd number; got {sizes}"
    return ""


def _why_different(module, form, has_rate, shape, white_level, rate):
    """Why forward differs from ours in this form on random numbers, "" if it does not; in float32 on the CPU."""
    with probe.sandbox() as random:
        frames = random(shape)
        core = random((shape[0], frames[0, ..., 0, 0].numel() * module.kernel_size[0] ** 2, *shape[-2:]), 100)
        bare, leaves, rest = probe.without_weights(module, {}), [frames, core], []
        if white_level is not None:
            leaves += [frames.new_tensor([white_level]).requires_grad_()]
            rest = [rate] if has_rate else []
        ours = *leaves, *([1.0, 1] if white_level is None else rest or [1]), form
        return probe.why_different(
            bare, lambda _: bare.forward(*leaves, *rest), lambda _: _filter(bare, *ours, "reference"), leaves, random
        )


def _filter(module, frames, core, white_level, rate, form, backend=None):
    """KernelConv's output. The taps of a colour are `colours` planes apart, so the filter's batch is the colours."""
    frames = frames.unsqueeze(2) if frames.dim() == 4 else frames
    batch, count, colours, *size = frames.shape
    core = core.view(batch, count, -1, colours, *size).flatten(0, 2).transpose(0, 1)
    options = {"kernel_size": module.kernel_size[0], "groups": batch * count, "dilation": rate, "backend": backend}
    out = filter_as_eager(frames.flatten(0, 1).transpose(0, 1), core, **options).transpose(0, 1)
    out = out.reshape(frames.shape).squeeze(2) if form == "plain" else out.reshape(frames.shape).squeeze()
    out = out if type(white_level) in (int, float) and white_level == 1 else out / white_level
    return (out, out.mean(1)) if form == "pair" else out


def _why_not_this_call(module, frames, core, rate):
    if reason := class_swap.why_changed(module) or _why_not(module):
        return reason
    return "" if _fits(module.kernel_size[0], frames, core, rate) else class_swap.UNSUPPORTED_CALL


def _fits(kernel_size, frames, core, rate):
    """Whether the arguments fit each other. Only core's memory counts: MISF passes [..., W, H] for [..., H, W]."""
    if not are_supported(frames, core) or frames.dim() not in (4, 5):
        return False
    shape = len(frames), frames.shape[1:-2].numel() * kernel_size**2, *frames.shape[-2:]
    viewable = core.shape == shape or (core.is_contiguous() and core.numel() == math.prod(shape))
    return viewable and type(rate) is int and rate > 0


class _WithRate(class_swap.AcceleratedModule):
    def forward(self, frames, core, white_level=1.0, rate=1):
        """MISF's method."""
        if class_swap.falls_back(self, _why_not_this_call(self, frames, core, rate)):
            return super().forward(frames, core, white_level, rate)
        return _filter(self, frames, core, white_level, rate, self._inr_match.details)


class _WithoutRate(class_swap.AcceleratedModule):
    def forward(self, frames, core, white_level=1.0):
        """KPN's method."""
        if class_swap.falls_back(self, _why_not_this_call(self, frames, core, 1)):
            return super().forward(frames, core, white_level)
        return _filter(self, frames, core, white_level, 1, self._inr_match.details)


_ARGUMENTS = (("frames",), ("core",), ("white_level", 1.0))
_MIXINS = {_ARGUMENTS: _WithoutRate, (*_ARGUMENTS, ("rate", 1)): _WithRate}

ADAPTER = register(Adapter("MISF's KernelConv", is_candidate, verify, {"KernelConv": ATTRIBUTES}))
