"""Convolutions with constant weights, which keep one bit per ReLU for the gradient of their input."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core import signs
from inr_kernels._core.hooks import is_untouched
from inr_kernels.fourier_unit import conv2d
from inr_kernels.fourier_unit.module.folding import affine, folded, folds


def constant(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns layers that compute the same in evaluation, for gradients of their input only.

    Each Conv2d of stride 1 and each ConvTranspose2d becomes one layer with the ReflectionPad2d before it, the batch
    norm and the ReLU after it. Their weights are folded once, here. Other layers, and those with hooks, are returned
    unchanged.
    """
    out: list[nn.Module] = []
    rest: list[Any] = list(layers)
    while rest:
        padding = [rest.pop(0)] if _is(rest[0], nn.ReflectionPad2d) and rest[1:] and _is_supported(rest[1]) else []
        layer = rest.pop(0)
        if _is_supported(layer):
            norm = rest.pop(0) if rest and _is(rest[0], nn.BatchNorm2d) and folds(rest[0], nn.ReLU()) else nn.Identity()
            relu = [rest.pop(0)] if rest and _is(rest[0], nn.ReLU) else []
            layer = _ConstantConvolution(layer, norm, bool(relu), padding[0].padding if padding else (0, 0, 0, 0))
        out.append(layer)
    return out


def _is(layer, kind):
    return type(layer) is kind and is_untouched(layer)


def _is_supported(layer: Any) -> bool:
    if type(layer) not in (nn.Conv2d, nn.ConvTranspose2d) or layer.groups != 1 or not is_untouched(layer):
        return False
    return (
        layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and (type(layer) is nn.ConvTranspose2d or (layer.stride == (1, 1) and min(_complement(layer)) >= 0))
    )


def _complement(conv: Any) -> tuple[int, ...]:
    """The padding of the convolution that computes the gradient of this one's input, for a stride of 1."""
    pairs = zip(conv.kernel_size, conv.dilation, conv.padding, strict=True)
    return tuple(dilation * (kernel - 1) - padding for kernel, dilation, padding in pairs)


class _ConstantConvolution(nn.Module):
    """relu(norm(conv(pad(x)))) or norm(conv(pad(x)))."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, conv: Any, norm: nn.Module, relu: bool, reflected: tuple[int, ...]):
        super().__init__()
        self.reflected = reflected  # pixels of the padding: left, right, top, bottom
        self.transposed = type(conv) is nn.ConvTranspose2d
        weight = conv.weight.transpose(0, 1) if self.transposed else conv.weight
        weight, bias = folded(weight, conv.bias, affine(norm))
        weight = weight.transpose(0, 1) if self.transposed else weight
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.relu, self.dilation, self.complement = relu, conv.dilation, _complement(conv)
        self.stride, self.padding, self.output_padding = conv.stride, conv.padding, conv.output_padding
        left, right, top, bottom = reflected
        both = any(reflected) and (self.transposed or any(conv.padding))
        self.is_fused = (left, top) == (right, bottom) and min(left, top) >= 0 and not both and conv.dilation == (1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        return _Convolve.apply(self, x)

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """`forward`, without autograd."""
        if self.is_fused:
            left, _, top, _ = self.reflected
            options: dict[str, Any] = {"padding": self.padding, "output_padding": self.output_padding}
            if any(self.reflected):
                options = {"padding": (top, left), "padding_mode": "reflect"}
            if self.transposed:
                options |= {"transposed": True, "stride": self.stride}
            return conv2d(x, self.weight, self.bias, relu=self.relu, **options)
        if any(self.reflected):
            x = F.pad(x, self.reflected, mode="reflect")
        if self.transposed:
            geometry: Any = (self.stride, self.padding, self.output_padding, 1, self.dilation)
            out = F.conv_transpose2d(x, self.weight, self.bias, *geometry)
        else:
            out = F.conv2d(x, self.weight, self.bias, 1, self.padding, self.dilation)
        return out.relu_() if self.relu else out

    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of x from that of the convolution."""
        weight = self.weight.to(grad.dtype)
        if self.transposed and self.is_fused:
            grad = conv2d(grad, weight, stride=self.stride, padding=self.padding)
        elif self.transposed:
            grad = F.conv2d(grad, weight, None, self.stride, self.padding, self.dilation)
        else:
            grad = F.conv2d(grad, weight.flip(2, 3).transpose(0, 1), None, 1, self.complement, self.dilation)
        if not any(self.reflected):
            return grad
        left, right, top, bottom = self.reflected
        inner = grad[:, :, top : grad.shape[2] - bottom, left : grad.shape[3] - right]
        return torch.ops.aten.reflection_pad2d_backward(grad, inner, self.reflected)


class _Convolve(torch.autograd.Function):
    """`_ConstantConvolution.forward`, differentiable once, by x."""

    @staticmethod
    def forward(ctx: Any, layer: _ConstantConvolution, x: torch.Tensor) -> torch.Tensor:
        out = layer.convolve(x)
        ctx.layer, ctx.dtype = layer, x.dtype
        if layer.relu and ctx.needs_input_grad[1]:
            ctx.save_for_backward(signs.pack(out))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        if ctx.layer.relu:
            (bits,) = ctx.saved_tensors
            grad = signs.select(grad, bits)
        return None, ctx.layer.input_gradient(grad).to(ctx.dtype)
