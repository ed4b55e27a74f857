"""CARAFE of XiaLiPKU/CARAFE and its copies in detectors: upsampling by kernels that are computed from the input.

    kernels = softmax over the taps of PixelShuffle(enc(comp(x)))
    out[Y, X] = sum_ij kernels_ij[Y, X] x[Y // scale + i - K // 2, X // scale + j - K // 2]

The original enlarges and unfolds the input, K² s² times its size; `elementwise_filter` reads it in place.
"""

from typing import Any

import torch
from torch import nn

from inr_kernels._core.checks import has_autocast
from inr_kernels._core.hooks import is_untouched

from . import class_swap, probe
from .class_swap import AcceleratedModule, Adapter, Match, Unsupported, register
from .filter_dtypes import are_supported, filter_as_eager

LAYERS = {"pix_shf": nn.PixelShuffle, "upsmp": nn.Upsample, "unfold": nn.Unfold}
ATTRIBUTES = ("scale", "comp", "enc", *LAYERS)
SIGNATURES = ((("X",),), (("x",),))
SIZES = ((2, 3, 5, 4), (1, 1, 1, 3))  # of the inputs to compare on


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has CARAFE's attributes."""
    return all(hasattr(module, name) for name in ATTRIBUTES)


def verify(module: nn.Module) -> Match:
    """The match of one CARAFE; Unsupported if its layers or its forward compute something else."""
    ((name,),) = class_swap.check_method(module, "forward", SIGNATURES)
    if reason := _why_not(module):
        raise Unsupported(reason)
    if reason := probe.first_reason(_why_different(module, shape) for shape in SIZES):
        raise Unsupported(f"forward is not CARAFE's: {reason}")
    return class_swap.match(module, _Carafe, "forward", (name, *_options(module)))


def _options(module):
    """What the layers between the projections and the sum compute: all their attributes that a forward reads."""
    shuffle, enlarge, unfold = (getattr(module, name) for name in LAYERS)
    windows = unfold.kernel_size, unfold.dilation, unfold.padding, unfold.stride
    return shuffle.upscale_factor, enlarge.size, enlarge.scale_factor, enlarge.mode, *windows


def _why_not(module):
    """Why the layers are not supported, "" if they are."""
    for name, cls in LAYERS.items():
        if type(getattr(module, name)) is not cls:
            return f"{name} is not a {cls.__name__}"
    scale, side = module.scale, module.unfold.kernel_size
    if type(scale) is not int or scale < 1:
        return f"scale must be a positive integer; got {scale}"
    if type(side) is not int or side % 2 != 1:
        return f"the kernel of unfold must be an odd number; got {side}"
    expected = scale, None, float(scale), "nearest", side, scale, side // 2 * scale, 1
    same = _options(module) == expected
    return "" if same else f"its layers are not those of a scale of {scale} and a kernel of {side}"


def _why_different(module, shape):
    """Why forward differs from ours on random numbers, "" if it does not; in float32 on the CPU."""
    with probe.sandbox() as random:
        x, taps = random(shape), (module.scale * module.unfold.kernel_size) ** 2
        layers = {name: getattr(module, name) for name in LAYERS}
        kernels = random((shape[1], taps, 1, 1))
        bare = probe.without_weights(module, layers | {"comp": _Cosine(), "enc": _Product(kernels)})
        return probe.why_different(
            bare, lambda _: bare.forward(x), lambda _: _upsample(bare, x, "reference"), [x, kernels], random
        )


class _Cosine(nn.Module):
    """Replaces the first projection."""

    def forward(self, x):
        return x.cos()


class _Product(nn.Module):
    """Replaces the second projection: a 1 x 1 convolution with these weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights = [weights]  # no parameter: it is a leaf of the comparison

    def forward(self, x):
        return torch.einsum("bcyx,co->boyx", x, self.weights[0][:, :, 0, 0])


def _upsample(module, x, backend=None):
    """CARAFE's output."""
    kernels = module.pix_shf(module.enc(module.comp(x)))
    side, scale = module.unfold.kernel_size, module.scale
    options: dict[str, Any] = {"kernel_size": side, "upscale": scale, "groups": 1, "normalize": "taps"}
    return filter_as_eager(x, kernels, **options, backend=backend)


def _why_not_this_call(module, x):
    if reason := class_swap.why_changed(module) or _why_not(module):
        return reason
    if not is_untouched(*(getattr(module, name) for name in LAYERS)):
        return "a hook on its layers or on all modules is registered"
    if not are_supported(x) or x.dim() != 4:
        return class_swap.UNSUPPORTED_CALL
    return "autocast is enabled" if has_autocast(x) else ""


class _Carafe(AcceleratedModule):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """CARAFE's forward; the name of its argument differs between copies."""
        name = self._inr_match.details[0]
        x = args[0] if args else kwargs.get(name)
        reason = class_swap.UNSUPPORTED_CALL if len(args) + len(kwargs) != 1 else _why_not_this_call(self, x)
        if class_swap.falls_back(self, reason):
            return super().forward(*args, **kwargs)
        return _upsample(self, x)


ADAPTER = register(Adapter("CARAFE", is_candidate, verify, {"CARAFE": ATTRIBUTES}))
