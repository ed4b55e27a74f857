"""An FFC layer with constant weights, for inference on a CPU with little time in Python."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import op
from ..arguments import compute_dtype
from .folded_layer import FoldedLayer, Pair


class Inference:
    """Computes what a `FoldedLayer` does, without gradients, by direct calls of the C++ kernels.

    The weights are transformed once, when it is created. The kernels are called without the ops around them, since on
    small maps the calls of ops take a large part of the time.
    """

    def __init__(self, layer: FoldedLayer):
        local, across, padding = layer.local_weight, layer.across_weight, layer.padding
        self._inputs = across.shape[1], local.shape[1] - across.shape[1]
        self._outputs, self._dtype, self._norm = (len(local), len(across)), local.dtype, layer.norm
        self._steps = op.native_steps()
        self._is_consistent = _is_consistent(layer)
        if not self._is_consistent:  # it takes no maps
            return
        self._local = op.NativeConv3x3.constant(local, layer.local_bias, True, padding)
        self._across = op.NativeConv3x3.constant(across, layer.across_bias, True, padding)
        self._product = op.NativeProduct.constant(layer.unit_weight, layer.unit_bias, True, layer.unit_groups)
        self._first = _pointwise(layer.first_weight, layer.first_bias, layer.groups, True)
        self._last = _pointwise(layer.last_weight, None, layer.last_groups, False)

    def takes(self, x: Pair, residual: Pair | None = None) -> bool:
        """Whether the maps, dense ones on the CPU, fit the weights, which must be consistent, and each other."""
        batch, _, *size = x[0].shape
        maps, widths = (x, self._inputs) if residual is None else (x + residual, self._inputs + self._outputs)
        sizes = [(batch, channels, *size) for channels in widths]
        fits = all(t.dtype == self._dtype and t.shape == size for t, size in zip(maps, sizes, strict=True))
        return fits and batch > 0 and min(size) >= 2 and self._is_consistent

    def __call__(self, x: Pair, residual: Pair | tuple[None, None] = (None, None)) -> Pair:
        """(local, global) -> (local, global), plus the residual."""
        x_l, x_g = (part.to(compute_dtype(self._dtype)) for part in x)
        y = self._first(x_g)
        z = self._product(self._steps.transform(y, self._norm), add_input=True)
        across = self._last(self._steps.inverse(z, y.shape[2:], self._norm))
        local, across = self._local(x_l, x_g, None, residual[0]), self._across(x_l, None, across, residual[1])
        return local.to(self._dtype), across.to(self._dtype)


def _is_consistent(layer):
    """Whether the weights, which the kernels take as they are, have one dtype and fit each other."""
    local, across, hidden = len(layer.local_weight), len(layer.across_weight), len(layer.first_weight)
    channels, both = layer.across_weight.shape[1], layer.local_weight.shape[1]
    shapes = {
        "local": [local, both, 3, 3],
        "across": [across, channels, 3, 3],
        "first": [hidden, (both - channels) // layer.groups, 1, 1],
        "unit": [2 * hidden, 2 * hidden // layer.unit_groups],
        "last": [across, hidden // layer.last_groups, 1, 1],
    }
    dtype = layer.local_weight.dtype
    for name, shape in shapes.items():
        weight, bias = getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_bias")
        own = compute_dtype(dtype) if name == "unit" else dtype
        if list(weight.shape) != shape or weight.dtype != own:
            return False
        if bias is not None and (len(bias) != shape[0] or bias.dtype != own):
            return False
    return True


def _pointwise(
    weight: torch.Tensor, bias: torch.Tensor | None, groups: int, relu: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A 1 x 1 convolution of maps in `compute_dtype`, or the ReLU of it."""
    dtype = compute_dtype(weight.dtype)
    weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)
    if groups == 1:
        kernel, outputs = op.NativeConv2d.pointwise(weight, bias, relu), len(weight)
        return lambda x: kernel(x, None, (len(x), outputs, *x.shape[2:]))

    def convolve(x: torch.Tensor) -> torch.Tensor:
        out = F.conv2d(x, weight, bias, groups=groups)
        return out.relu_() if relu else out

    return convolve
