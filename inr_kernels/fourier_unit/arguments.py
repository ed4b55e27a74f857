"""The arguments of the ops fourier_unit, conv3x3 and conv2d: the names of their options, their bounds checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import require, require_match, require_tensor, shape

NORMS = ("ortho", "backward", "forward")
TRANSPOSED = "reflect transposed"
PADDINGS = ("reflect", "zeros", TRANSPOSED)  # of conv3x3


@dataclass(frozen=True)
class Facts(dispatch.Facts):
    """Device, dtype and the longer side of the image."""

    side: int = 0

    @property
    def form(self) -> str:
        """The longer side: small transforms are matrix products on a GPU."""
        return f"side {dispatch.up_to(self.side, 64)}" if self.side else ""


class Arguments(NamedTuple):
    """fourier_unit's arguments before `backend`, as its schema orders them (op)."""

    x: torch.Tensor  # [B, C, H, W]
    weight: torch.Tensor  # [2 O, 2 C / groups] in `compute_dtype`, as scale and shift
    scale: torch.Tensor  # [2 O]
    shift: torch.Tensor  # [2 O]
    training: bool
    eps: float
    groups: int
    norm: str

    def facts(self) -> Facts:
        """What decides on the backend."""
        return Facts(self.x.device, self.x.dtype, max(self.x.shape[2:]))

    def out_shape(self) -> tuple[int, ...]:
        """[B, O, H, W]."""
        return len(self.x), len(self.weight) // 2, *self.x.shape[2:]

    def check(self) -> None:
        """Raises unless the options are valid and the tensors fit them, which keeps kernels in bounds."""
        check_x(self.x)
        check_norm(self.norm)
        check_weight(self.weight, self.x, self.groups)
        dtype, device, rows = compute_dtype(self.x.dtype), self.x.device, len(self.weight)
        require_match(self.weight, "weight", self.weight.shape, dtype, device)
        for tensor, name in ((self.scale, "scale"), (self.shift, "shift")):
            require_match(tensor, name, (rows,), dtype, device)

    def check_saved(self, grad: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> None:
        """Raises unless the output's gradient and the saved statistics fit."""
        require_match(grad, "grad", self.out_shape(), self.x.dtype, self.x.device)
        for tensor, name in ((mean, "mean"), (var, "var")):
            rows = len(self.weight) if self.training else 0
            require_match(tensor, name, (rows,), self.weight.dtype, self.x.device)


class ConvolutionArguments(NamedTuple):
    """conv3x3's arguments before `backend`, as its schema orders them (op)."""

    x: torch.Tensor  # [B, C, H, W]
    weight: torch.Tensor  # [O, C + D, 3, 3]
    bias: torch.Tensor | None  # [O]
    other: torch.Tensor | None  # [B, D, H, W]
    add: torch.Tensor | None  # [B, O, H, W]
    relu: bool
    padding: str

    def facts(self) -> dispatch.Facts:
        """What decides on the backend."""
        return dispatch.Facts(self.x.device, self.x.dtype)

    def out_shape(self) -> tuple[int, ...]:
        """[B, O, H, W]."""
        return len(self.x), len(self.weight), *self.x.shape[2:]

    def check_types(self) -> None:
        """Raises unless the tensors are tensors with the right number of dimensions, on one device."""
        for tensor, name, dims in (
            (self.x, "x", 4), (self.weight, "weight", 4), (self.bias, "bias", 1), (self.other, "other", 4),
            (self.add, "add", 4),
        ):  # fmt: skip
            if tensor is not None or name in ("x", "weight"):
                require_tensor(tensor, name, dims=(dims,), like=self.x)

    def check(self) -> None:
        """Raises unless the tensors fit each other and the padding, which keeps kernels in bounds."""
        self.check_types()
        if self.padding not in PADDINGS:
            require(False, "padding", f"be one of {', '.join(PADDINGS)}", repr(self.padding))
        min_side = 1 if self.padding == "zeros" else 2
        batch, channels, *size = self.x.shape
        require(channels > 0, "x", "have at least one channel", shape(self.x))
        if min(size) < min_side:
            require(False, "x", f"have sides of at least {min_side} with padding={self.padding!r}", shape(self.x))
        if self.other is not None:
            fits = (len(self.other), *self.other.shape[2:]) == (batch, *size)
            require(fits, "other", "have x's batch and size", shape(self.other))
            channels += self.other.shape[1]
        if self.weight.shape[1:] != (channels, 3, 3) or not len(self.weight):
            require(False, "weight", f"have shape [O, {channels}, 3, 3], O > 0", shape(self.weight))
        out = self.out_shape()
        for tensor, name, expected in ((self.bias, "bias", out[1:2]), (self.add, "add", out)):
            if tensor is not None and tensor.shape != expected:
                require(False, name, f"have shape {list(expected)}", shape(tensor))
        others = {"weight": self.weight, "bias": self.bias, "other": self.other, "add": self.add}
        for name, tensor in others.items():
            if tensor is not None and tensor.dtype != self.x.dtype:
                require(False, name, f"have x's dtype {self.x.dtype}", tensor.dtype)


class Conv2dArguments(NamedTuple):
    """conv2d's arguments before `backend`, as its schema orders them (op)."""

    x: torch.Tensor  # [B, C, H, W]
    weight: torch.Tensor  # [O, C, kh, kw], transposed [C, O, kh, kw]
    scale: torch.Tensor | None  # [O]
    bias: torch.Tensor | None  # [O]
    add: torch.Tensor | None  # [B, O, H', W']
    relu: bool
    stride: Sequence[int]  # two numbers, by axis, like the others
    padding: Sequence[int]
    padding_mode: str
    transposed: bool
    output_padding: Sequence[int]

    def facts(self) -> dispatch.Facts:
        """What decides on the backend."""
        return dispatch.Facts(self.x.device, self.x.dtype)

    def out_shape(self) -> tuple[int, ...]:
        """[B, O, H', W']."""
        sides = []
        for n, kernel, step, pad, extra in zip(
            self.x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.output_padding, strict=True
        ):
            rest = n + 2 * pad - kernel
            sides.append((n - 1) * step - 2 * pad + kernel + extra if self.transposed else rest // step + 1)
        return len(self.x), self.weight.shape[int(self.transposed)], *sides

    def check_types(self) -> None:
        """Raises unless the tensors are tensors with the right number of dimensions, on one device."""
        for tensor, name, dims in (
            (self.x, "x", 4), (self.weight, "weight", 4), (self.scale, "scale", 1), (self.bias, "bias", 1),
            (self.add, "add", 4),
        ):  # fmt: skip
            if tensor is not None or name in ("x", "weight"):
                require_tensor(tensor, name, dims=(dims,), like=self.x)

    def check(self) -> None:
        """Raises unless the tensors and the options fit each other, which keeps kernels in bounds."""
        self.check_types()
        for value, name, least in (
            (self.stride, "stride", 1), (self.padding, "padding", 0), (self.output_padding, "output_padding", 0)
        ):  # fmt: skip
            if len(value) != 2 or min(value) < least:
                require(False, name, f"be a number of at least {least}, or two", tuple(value))
        reflects = self.padding_mode == "reflect"
        if not (reflects or self.padding_mode == "zeros"):
            require(False, "padding_mode", "be 'zeros' or 'reflect'", repr(self.padding_mode))
        require(not (reflects and self.transposed), "padding_mode", "be 'zeros' with transposed", "'reflect'")
        extra = tuple(self.output_padding)
        if self.transposed:
            smaller = all(a < b for a, b in zip(extra, self.stride, strict=True))
            require(smaller, "output_padding", f"be less than stride {tuple(self.stride)}", extra)
        else:
            require(not any(extra), "output_padding", "be 0 without transposed", extra)
        channels, sides = self.x.shape[1], self.x.shape[2:]
        require(min(channels, *sides) > 0, "x", "have at least one channel and one pixel", shape(self.x))
        if reflects and any(pad >= n for pad, n in zip(self.padding, sides, strict=True)):
            require(False, "x", f"have longer sides than padding {tuple(self.padding)} with 'reflect'", shape(self.x))
        if self.weight.shape[int(not self.transposed)] != channels or not self.weight.numel():
            form = f"[{channels}, O, kh, kw]" if self.transposed else f"[O, {channels}, kh, kw]"
            require(False, "weight", f"have shape {form}, none 0", shape(self.weight))
        out = self.out_shape()
        if min(out[2:]) < 1:
            require(False, "x", "be at least as large as the kernel, padded, so that there is an output", shape(self.x))
        for tensor, name, expected in (
            (self.scale, "scale", out[1:2]), (self.bias, "bias", out[1:2]), (self.add, "add", out)
        ):  # fmt: skip
            if tensor is not None and tensor.shape != expected:
                require(False, name, f"have shape {list(expected)}", shape(tensor))
        for name in ("weight", "scale", "bias", "add"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype != self.x.dtype:
                require(False, name, f"have x's dtype {self.x.dtype}", tensor.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a unit computes in: float64 for float64, else float32.

    Half precision would overflow in the spectrum, whose first value is the sum of all pixels.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_x(x: torch.Tensor) -> None:
    """Raises unless x is a map [B, C, H, W] with at least one channel and one pixel."""
    require_tensor(x, "x", dims=(4,))
    require(min(x.shape[1:]) > 0, "x", "have at least one channel and one pixel, [B, C, H, W]", shape(x))


def check_norm(norm: str) -> None:
    """Raises unless norm is one of torch.fft's."""
    if norm not in NORMS:
        require(False, "norm", f"be one of {', '.join(NORMS)}", repr(norm))


def check_weight(weight: torch.Tensor, x: torch.Tensor, groups: int) -> torch.Tensor:
    """weight as [2 O, 2 C / groups]; raises unless it fits x and groups."""
    require_tensor(weight, "weight", dims=(2, 4), like=x)
    channels = x.shape[1]
    require(groups > 0 and channels % groups == 0, "groups", f"divide x's {channels} channels", groups)
    rule = f"have shape [2 O, {2 * channels // groups}] or that with [1, 1], for x's {channels} channels"
    fits = weight.shape[1] == 2 * channels // groups and all(n == 1 for n in weight.shape[2:])
    require(fits, "weight", rule, shape(weight))
    rule = f"have two rows per output channel, in {groups} groups"
    require(len(weight) > 0 and len(weight) % (2 * groups) == 0, "weight", rule, shape(weight))
    return weight.flatten(1)
