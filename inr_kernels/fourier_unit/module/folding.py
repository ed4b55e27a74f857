"""When modules need not be called, and what their numbers are then."""

import torch
from torch import nn

from inr_kernels._core.hooks import is_untouched


def computes(module, cls):
    """Whether a call is nothing but the forward of cls, one of ours; integrations/lama.py proves it of others."""
    kind = type(module)
    return getattr(kind, "_inr_kind", kind).forward is cls.forward and is_untouched(module)


def is_pointwise(conv):
    """Whether a module is nothing but the product of its weight [O, C / groups, 1, 1] with every pixel."""
    plain = type(conv) is nn.Conv2d and conv.bias is None and conv.kernel_size == (1, 1) == conv.stride
    return plain and conv.padding == (0, 0) and is_untouched(conv)


def folds(norm, activation):
    """Whether a norm is an affine map now, and what follows a ReLU or nothing."""
    batch_norm = type(norm) is nn.BatchNorm2d and norm.affine and norm.running_mean is not None and not norm.training
    simple = type(norm) is nn.Identity or batch_norm
    return simple and type(activation) in (nn.ReLU, nn.Identity) and is_untouched(norm, activation)


def affine(norm):
    """(scale, shift) of a batch norm in evaluation, in float32 at least; None for what does nothing."""
    if isinstance(norm, nn.Identity):
        return None
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    weight, bias, mean, var = (t.to(wide) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight * torch.rsqrt(var + norm.eps)
    return scale, bias - mean * scale


def scaled(weight, scale):
    """A convolution's weight with its outputs scaled, in its own dtype."""
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)
