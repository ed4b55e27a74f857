"""KernelConv of MISF, EfficientDeRain(+), JPGNet, and of the KPN that they took it from.

frames [B, N, H, W], core [B, N K², H, W]; or frames [B, N, colours, H, W], core [B, (N K²) colours, H, W], where the
taps come before the colours. The output is `elementwise_filter`'s at dilation `rate`, divided by `white_level`.
"""

import math

import torch

from . import class_swap, probe
from .filter_dtypes import are_filterable, filtered

WHAT = "MISF's KernelConv"
ATTRIBUTES = ("kernel_size", "sep_conv", "core_bias")
# How copies return the output: all axes of length one dropped, with the mean over axis 1 (KPN); so, alone; as it is.
FORMS = ("pair", "squeezed", "plain")
# Frames' shape, white_level (None: the defaults), rate. Large batches and axes of length one are where copies differ.
PROBLEMS = [
    ((2, 3, 5, 4), None, 1),
    ((1, 3, 1, 4), 2.0, 3),
    ((11, 1, 3, 4), 0.5, 2),
    ((2, 2, 3, 4, 5), None, 1),
    ((1, 2, 1, 5, 4), 2.0, 2),
]


def is_candidate(module):
    """Whether it deserves a word in the log: it has KernelConv's attributes."""
    return all(hasattr(module, name) for name in ATTRIBUTES)


def replace(module):
    """Accelerates one KernelConv, in place. Returns why it was left alone, "" if it was not."""
    return class_swap.attempt(module, _verify)


def why_not(module):
    """Why the options are none of ours, "" if they are."""
    if module.sep_conv:
        return "its cores are separable (sep_conv)"
    if module.core_bias:
        return "its cores have a bias (core_bias)"
    sizes = module.kernel_size
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 1 or type(sizes[0]) is not int or sizes[0] % 2 != 1:
        return f"kernel_size is not one odd number but {sizes}"
    return ""


def _verify(module):
    signature = class_swap.signature(type(module), "forward")
    if signature not in _MIXINS:
        raise class_swap.LeftAlone("forward does not take (frames, core, white_level=1.0) or that and rate=1")
    if "forward" in vars(module):
        raise class_swap.LeftAlone("forward is patched on the object")
    if reason := why_not(module):
        raise class_swap.LeftAlone(reason)
    for form in FORMS:
        reason = probe.first(_differs(module, form, len(signature) == 4, *problem) for problem in PROBLEMS)
        if not reason:
            return _MIXINS[signature], class_swap.verdict(module, "forward", form)
    raise class_swap.LeftAlone(f"forward is not KernelConv's: {reason}")


def _differs(module, form, has_rate, shape, white_level, rate):
    """Why forward is not ours in this form, "" if on random numbers it is; in float32 on the CPU."""
    with probe.quiet_and_plain() as random:
        frames = random(shape)
        core = random((shape[0], frames[0, ..., 0, 0].numel() * module.kernel_size[0] ** 2, *shape[-2:]), 100)
        shell, leaves, rest = probe.shell(module, {}), [frames, core], []
        if white_level is not None:
            leaves += [torch.tensor([white_level]).requires_grad_()]
            rest = [rate] if has_rate else []
        ours = *leaves, *([1.0, 1] if white_level is None else rest or [1]), form
        return probe.differs(
            shell, lambda _: shell.forward(*leaves, *rest), lambda _: _filter(shell, *ours, "reference"), leaves, random
        )


def _filter(module, frames, core, white_level, rate, form, backend=None):
    """KernelConv's output. A colour's taps are `colours` planes apart in every frame: they are the batch."""
    frames = frames.unsqueeze(2) if frames.dim() == 4 else frames
    batch, count, colours, *size = frames.shape
    core = core.view(batch, count, -1, colours, *size).flatten(0, 2).transpose(0, 1)
    options = {"kernel_size": module.kernel_size[0], "groups": batch * count, "dilation": rate, "backend": backend}
    out = filtered(frames.flatten(0, 1).transpose(0, 1), core, **options).transpose(0, 1)
    out = out.reshape(frames.shape).squeeze(2) if form == "plain" else out.reshape(frames.shape).squeeze()
    out = out if type(white_level) in (int, float) and white_level == 1 else out / white_level
    return (out, out.mean(1)) if form == "pair" else out


def _filter_unless(module, frames, core, white_level, rate):
    """KernelConv's output, or None if the original has to compute it."""
    reason = class_swap.why_changed(module) or why_not(module)
    if not reason and not _fits(module.kernel_size[0], frames, core, rate):
        reason = "the arguments of a call fit neither each other nor KernelConv"
    if reason:
        class_swap.as_before(module, reason)
        return None
    return _filter(module, frames, core, white_level, rate, module._inr_verdict.found)


def _fits(kernel_size, frames, core, rate):
    """The core may have another shape, as MISF's has for images that are not square: what counts is its memory."""
    if not are_filterable(frames, core) or frames.dim() not in (4, 5):
        return False
    shape = len(frames), frames.shape[1:-2].numel() * kernel_size**2, *frames.shape[-2:]
    viewable = core.shape == shape or (core.is_contiguous() and core.numel() == math.prod(shape))
    return viewable and type(rate) is int and rate > 0


class _WithRate(class_swap.Accelerated):
    _inr_replace = staticmethod(replace)

    def forward(self, frames, core, white_level=1.0, rate=1):
        """MISF's."""
        out = _filter_unless(self, frames, core, white_level, rate)
        return super().forward(frames, core, white_level, rate) if out is None else out


class _WithoutRate(class_swap.Accelerated):
    _inr_replace = staticmethod(replace)

    def forward(self, frames, core, white_level=1.0):
        """KPN's."""
        out = _filter_unless(self, frames, core, white_level, 1)
        return super().forward(frames, core, white_level) if out is None else out


_ARGUMENTS = (("frames",), ("core",), ("white_level", 1.0))
_MIXINS = {_ARGUMENTS: _WithoutRate, (*_ARGUMENTS, ("rate", 1)): _WithRate}
