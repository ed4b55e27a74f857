"""Argument checks, whose errors name the argument, the rule and the value."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch


def require(condition: object, argument: str, rule: str, got: object) -> None:
    """Raises `ValueError: <argument> must <rule>; got <got>` unless the condition holds."""
    if not condition:
        raise ValueError(f"{argument} must {rule}; got {got}")


def require_tensor(
    value: Any,
    argument: str,
    *,
    dims: Sequence[int] | None = None,
    like: torch.Tensor | None = None,
    integers: bool = False,
) -> None:
    """Requires a dense floating-point tensor, with one of the given numbers of dimensions, on `like`'s device.

    integers: whether bool and integer dtypes are allowed too, as for a mask.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{argument} must be a dense tensor; got {'nested' if value.is_nested else value.layout}")
    if integers and (value.is_complex() or value.is_quantized):
        raise TypeError(f"{argument} must have a bool, integer or floating-point dtype; got {value.dtype}")
    if not (integers or value.is_floating_point()):
        raise TypeError(f"{argument} must have a floating-point dtype; got {value.dtype}")
    if not integers and value.dtype.itemsize < 2:
        raise TypeError(f"{argument} must have a dtype of at least 16 bits; got {value.dtype}")
    if dims is not None and value.dim() not in dims:
        require(False, argument, f"have {' or '.join(map(str, dims))} dimensions", shape(value))
    if like is not None and value.device != like.device:
        require(False, argument, f"be on {like.device}", value.device)


def require_input(value: Any, argument: str, channels: int, weight: torch.Tensor, *, any_dtype: bool = False) -> None:
    """Requires a layer's input [B, C, H, W] to fit its weight: the error names what the caller passed, not the weight.

    any_dtype: whether the layer takes other dtypes than its weight's, as every layer does under autocast.
    """
    require_tensor(value, argument, dims=(4,), like=weight)
    if value.shape[1] != channels:
        require(False, argument, f"have {channels} channels", shape(value))
    if value.dtype != weight.dtype and not (any_dtype or has_autocast(value)):
        require(False, argument, f"have the layer's dtype {weight.dtype}", value.dtype)


def require_match(
    value: torch.Tensor, argument: str, size: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Requires exactly this shape, dtype and device: the bounds check of a tensor that a kernel reads by address."""
    if value.shape == tuple(size) and value.dtype == dtype and value.device == device:
        return
    require(value.shape == tuple(size), argument, f"have shape {list(size)}", shape(value))
    require(value.dtype == dtype, argument, f"have dtype {dtype}", value.dtype)
    require(value.device == device, argument, f"be on {device}", value.device)


def is_positive_int(value: object) -> bool:
    """Whether the value is an integer, not a bool, and at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def shape(tensor: torch.Tensor) -> list[int]:
    """The shape as a list, as errors print it."""
    return list(tensor.shape)


def has_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is enabled on the tensor's device. torch has none for "meta"."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def result_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The tensor's dtype or, under autocast, autocast's dtype; float64 is kept, as autocast does."""
    casts = has_autocast(tensor) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(tensor.device.type) if casts else tensor.dtype


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context in which a function that has applied autocast computes."""
    return torch.autocast(tensor.device.type, enabled=False) if has_autocast(tensor) else contextlib.nullcontext()


def apply_autocast(first: torch.Tensor, *others: torch.Tensor | None) -> list[Any]:
    """The tensors in `result_dtype(first)` under autocast, else unchanged."""
    tensors = [first, *others]
    if not has_autocast(first):
        return tensors
    dtype = result_dtype(first)
    return [None if t is None else t.to(dtype) for t in tensors]
