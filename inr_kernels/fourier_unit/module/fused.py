"""Sequences of plain layers, computed by conv2d in evaluation; whether conv2d computes a convolution here."""

from typing import Any

import torch
from torch import nn

from inr_kernels._core import dispatch
from inr_kernels._core.checks import has_autocast
from inr_kernels._core.hooks import is_untouched

from .. import op
from ..functional import conv2d
from ..op import kept
from .folding import affine, folds


class FusedSequential(nn.Sequential):
    """An `nn.Sequential`; in evaluation on a CPU it fuses a convolution with the layers around it.

    A ReflectionPad2d before, and a BatchNorm2d and a ReLU after a Conv2d or ConvTranspose2d are computed by one
    `conv2d`, as long as no gradients of weights are needed. All other layers, and those with hooks, are called.

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
        group = _group(layers) if isinstance(x, torch.Tensor) and prefers_conv2d(x) else []
        if group and is_constant(*group):
            x = _convolve(group, x)
        else:
            group = layers[:1]
            x = group[0](x)
        layers = layers[len(group) :]
    return x


def prefers_conv2d(x: torch.Tensor) -> bool:
    """Whether conv2d's C++ kernel would compute a convolution of x, and is not avoided by a request or a tracer."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or has_autocast(x):
        return False
    return x.dim() == 4 and op.is_for_native(x) and dispatch.requested_backend(None) in ("", "cpu")


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
    """Computes a group of layers by one conv2d."""
    parts: dict[type, Any] = {type(layer): layer for layer in group}
    transposed = nn.ConvTranspose2d in parts
    conv = parts[nn.ConvTranspose2d if transposed else nn.Conv2d]
    reflected = parts.get(nn.ReflectionPad2d)
    scale, bias = affine(parts.get(nn.BatchNorm2d, nn.Identity())) or (None, None)
    if conv.bias is not None:
        bias = conv.bias if scale is None else torch.addcmul(bias, conv.bias, scale)
    return conv2d(
        x,
        kept.keep(conv.weight),
        bias,
        scale=scale,
        relu=nn.ReLU in parts,
        stride=conv.stride,
        padding=(reflected.padding[2], reflected.padding[0]) if reflected else conv.padding,
        padding_mode="reflect" if reflected else "zeros",
        transposed=transposed,
        output_padding=conv.output_padding if transposed else 0,
    )
