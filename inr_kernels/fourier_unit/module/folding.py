"""Folds norms into convolutions: which modules need not be called, and their coefficients."""

from typing import Any

import torch
from torch import nn

from inr_kernels._core.hooks import is_untouched


def computes(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling the module only runs the forward of cls, its class or the `_inr_kind` set by accelerate()."""
    kind = type(module)
    return getattr(kind, "_inr_kind", kind).forward is cls.forward and is_untouched(module)


def is_pointwise(conv: nn.Module) -> bool:
    """Whether calling the module only multiplies every pixel by its weight [O, C / groups, 1, 1]."""
    plain = type(conv) is nn.Conv2d and conv.bias is None and conv.kernel_size == (1, 1) == conv.stride
    return plain and conv.padding == (0, 0) and is_untouched(conv)


def folds(norm: nn.Module, activation: nn.Module) -> bool:
    """Whether the norm currently is an affine map, and the activation a ReLU or the identity."""
    batch_norm = type(norm) is nn.BatchNorm2d and norm.affine and norm.running_mean is not None and not norm.training
    simple = type(norm) is nn.Identity or batch_norm
    return simple and type(activation) in (nn.ReLU, nn.Identity) and is_untouched(norm, activation)


def affine(norm: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(scale, shift) of a batch norm in evaluation, at least in float32; None for the identity."""
    if isinstance(norm, nn.Identity):
        return None
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    weight, bias, mean, var = (t.to(dtype) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight * torch.rsqrt(var + norm.eps)
    return scale, bias - mean * scale


def folded(
    weight: torch.Tensor, bias: torch.Tensor | None, coefficients: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [O, C, k, k] and bias [O] of a convolution with the (scale, shift) after it; None: nothing follows."""
    folded_weight = weight if coefficients is None else scaled(weight, coefficients[0])
    return folded_weight, folded_bias(bias, coefficients, weight.dtype)


def folded_bias(
    bias: torch.Tensor | None, coefficients: tuple[torch.Tensor, torch.Tensor] | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """The bias [O] of a convolution with the (scale, shift) after it, in this dtype; None: nothing follows."""
    if coefficients is None:
        return bias
    scale, shift = coefficients
    return (shift if bias is None else shift + bias * scale).to(dtype)


def scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A convolution's weight [O, C, k, k] with its outputs scaled by [O], in the weight's dtype."""
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
