"""Errors that name the argument, the rule and what came."""

import torch


def require(condition, argument, rule, got):
    """Raises `ValueError: <argument> must <rule>; got <got>` unless the condition holds."""
    if not condition:
        raise ValueError(f"{argument} must {rule}; got {got}")


def require_tensor(value, argument, *, dims=None, like=None):
    """A floating-point tensor, of one of the given numbers of dimensions, on `like`'s device."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{argument} must have a floating-point dtype; got {value.dtype}")
    if value.dtype.itemsize < 2:
        raise TypeError(f"{argument} must have a dtype of at least 16 bits; got {value.dtype}")
    if dims is not None:
        wish = " or ".join(map(str, dims))
        require(value.dim() in dims, argument, f"have {wish} dimensions", shape(value))
    if like is not None:
        require(value.device == like.device, argument, f"be on {like.device}", value.device)


def shape(tensor):
    """The shape as users write it."""
    return list(tensor.shape)


def result_dtype(tensor):
    """The tensor's dtype or, where autocast is on, autocast's; like autocast, float64 stays."""
    device = tensor.device.type
    casts = torch.is_autocast_enabled(device) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else tensor.dtype
