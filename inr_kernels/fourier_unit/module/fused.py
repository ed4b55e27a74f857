"""Fuses sequences of plain layers in evaluation, and chooses the convolution that computes them.

On a CPU, convolutions are computed by conv2d and conv3x3, but in half precision by torch, with channels last, where it
is fast on this processor. Torch also computes the 1 x 1 convolutions of an FFC whose layers are called one by
one; a layer that is kept for inference (blocks.py) computes them by conv2d's kernel. Where gradients of the weights are
needed, the C++ kernels transform the weights at every call: on small maps, where this takes most of the time, the plain
layers are called.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core import backends, dispatch
from inr_kernels._core.checks import has_autocast
from inr_kernels._core.hooks import is_untouched

from ..functional import conv2d
from ..op import kept
from .folding import affine, folded_bias, folds, scaled

MIN_POSITIONS = 1024  # of a convolution's kernel in all images; with fewer, a map is small


class FusedSequential(nn.Sequential):
    """An `nn.Sequential`; in evaluation on a CPU it fuses a convolution with the layers around it.

    A ReflectionPad2d before, and a BatchNorm2d and a ReLU after a Conv2d or ConvTranspose2d are computed by one
    `conv2d`, or, in half precision on processors where torch is fast, by one of torch's with channels last, as
    long as no gradients of weights are needed. All other layers, and those with hooks, are called.

    Example:
        >>> up = FusedSequential(nn.ConvTranspose2d(4, 2, 3, 2, 1, 1), nn.BatchNorm2d(2), nn.ReLU()).eval()
        >>> up.requires_grad_(False)(torch.randn(1, 4, 5, 7)).shape
        torch.Size([1, 2, 10, 14])
    """

    def forward(self, x: Any) -> Any:
        """What nn.Sequential returns."""
        return sequence(list(self), x)


def sequence(layers: list[nn.Module], x: Any) -> Any:
    """Computes the layers one after the other, with convolutions fused where possible."""
    while layers:
        fuses = isinstance(x, torch.Tensor) and (prefers_conv2d(x) or prefers_channels_last(x))
        group = _group(layers) if fuses else []
        if group and is_constant(*group):
            x = _convolve(group, x)
        else:
            group = layers[:1]
            x = group[0](x)
        layers = layers[len(group) :]
    return x


def prefers_conv2d(x: torch.Tensor) -> bool:
    """Whether conv2d's C++ kernel would compute a convolution of x, and is not avoided by a request or a tracer."""
    return backends.is_for_native(x) and _may_fuse(x)


def prefers_channels_last(x: torch.Tensor) -> bool:
    """Whether torch computes a convolution of x, fastest with channels last: in fast half precision on a CPU."""
    half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return half and not backends.is_for_native(x) and kept.can_keep(x) and _may_fuse(x)


def is_small(x: torch.Tensor, *layers: nn.Module, stride: tuple[int, ...] = (1, 1)) -> bool:
    """Whether layers that are trained on x are called because of x's size, unless a backend is requested.

    stride: of its convolution. While a graph is recorded, which may run at other sizes, and for sizes that a layer may
    refuse: False.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or x.dim() != 4:
        return False
    if len(x) * x.shape[2] * x.shape[3] >= MIN_POSITIONS * math.prod(stride) or not x.numel() or min(x.shape[2:]) < 2:
        return False
    return x.device.type == "cpu" and not is_constant(*layers) and dispatch.requested_backend(None) == ""


def _may_fuse(x):
    """Whether no request and no tracer needs the layers to be called."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or has_autocast(x):
        return False
    return x.dim() == 4 and dispatch.requested_backend(None) in ("", "cpu")


def is_dense(conv: Any) -> bool:
    """Whether conv2d has this module's form of convolution: no groups, no dilation, padding with zeros by numbers."""
    plain = conv.groups == 1 and conv.dilation == (1, 1)
    return plain and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _group(layers):
    """The first layers if they are a convolution with layers around it that one conv2d computes, else []."""
    group = []
    rest: list[Any] = layers
    if type(rest[0]) is nn.ReflectionPad2d:
        group, rest = rest[:1], rest[1:]
        (left, right, top, bottom) = group[0].padding
        if (left, top) != (right, bottom) or min(left, top) < 0:
            return []
    if not rest or type(rest[0]) not in (nn.Conv2d, nn.ConvTranspose2d) or not is_dense(rest[0]):
        return []
    if group and (type(rest[0]) is nn.ConvTranspose2d or rest[0].padding != (0, 0)):
        return []
    group, rest = [*group, rest[0]], rest[1:]
    if rest and type(rest[0]) is nn.BatchNorm2d and folds(rest[0], nn.Identity()):
        group, rest = [*group, rest[0]], rest[1:]
    if rest and type(rest[0]) is nn.ReLU:
        group = [*group, rest[0]]
    return group if is_untouched(*group) else []


def is_constant(*layers: nn.Module) -> bool:
    """Whether no gradients of the layers' parameters are needed."""
    return not (torch.is_grad_enabled() and any(p.requires_grad for layer in layers for p in layer.parameters()))


def _convolve(group, x):
    """Computes a group of layers by one convolution."""
    parts: dict[type, Any] = {type(layer): layer for layer in group}
    transposed = nn.ConvTranspose2d in parts
    conv = parts[nn.ConvTranspose2d if transposed else nn.Conv2d]
    reflected = parts.get(nn.ReflectionPad2d)
    weight, scale, bias = _coefficients(conv, parts.get(nn.BatchNorm2d, nn.Identity()), x)
    if prefers_channels_last(x):
        x, padding = x.contiguous(memory_format=torch.channels_last), conv.padding
        if reflected:
            x = F.pad(x, reflected.padding, mode="reflect")
        if transposed:
            x = F.conv_transpose2d(x, weight, bias, conv.stride, padding, conv.output_padding)
        else:
            x = F.conv2d(x, weight, bias, conv.stride, padding)
        return x.relu_() if nn.ReLU in parts else x
    return conv2d(
        x,
        weight,
        bias,
        scale=scale,
        relu=nn.ReLU in parts,
        stride=conv.stride,
        padding=(reflected.padding[2], reflected.padding[0]) if reflected else conv.padding,
        padding_mode="reflect" if reflected else "zeros",
        transposed=transposed,
        output_padding=conv.output_padding if transposed else 0,
    )


def _coefficients(conv, norm, x):
    """The weight, scale and bias of a convolution of x with the norm after it.

    In half precision, which would round the scale, it is folded into the weight.
    """
    coefficients = affine(norm)
    scale, shift = coefficients or (None, None)
    if x.dtype.itemsize == 2:
        return folded_weight([conv], x, scale), None, folded_bias(conv.bias, coefficients, x.dtype)
    if conv.bias is None:
        bias = shift
    else:
        bias = conv.bias if scale is None else torch.addcmul(shift, conv.bias, scale)
    return kept.keep(conv.weight), scale, bias


def folded_weight(convs: Sequence[Any], x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The convolutions' weights, concatenated along the inputs' channels, with their outputs multiplied by scale [O].

    They are kept between calls where no gradients of them are needed.
    """
    weights, last = [conv.weight for conv in convs], prefers_channels_last(x)
    transposed = isinstance(convs[0], nn.ConvTranspose2d)

    def make() -> torch.Tensor:
        weight = weights[0] if len(weights) == 1 else torch.cat(weights, 1)
        if scale is not None:
            weight = scaled(weight.transpose(0, 1) if transposed else weight, scale)
            weight = weight.transpose(0, 1) if transposed else weight
        return weight.contiguous(memory_format=torch.channels_last) if last else weight

    constant = is_constant(*convs) and not (torch.is_grad_enabled() and scale is not None and scale.requires_grad)
    if not (constant and kept.can_keep(x, scale, *weights) and (last or prefers_conv2d(x))):
        return make()
    kept.keep(weights[0])
    reordered = last and not weights[0].is_contiguous(memory_format=torch.channels_last)
    if scale is None and len(weights) == 1 and not reordered:
        return weights[0]
    sources = *weights, *(() if scale is None else (scale,))
    return kept.once(weights[0], f"folded, {transposed}, {last}", sources, lambda: kept.keep(make(), constant=True))
