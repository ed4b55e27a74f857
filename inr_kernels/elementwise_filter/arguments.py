"""The arguments of the op elementwise_filter: the names of its options, its output's size, its bounds checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.backends import PADDINGS
from inr_kernels._core.checks import is_positive_int, require, require_match, require_tensor, shape

NORMALIZATIONS = {"none": 0, "taps": 1, "all": 2}  # the values of `Normalize` in csrc/inr.h


def reach(kernel_size: Sequence[int], dilation: int) -> tuple[int, int]:
    """How many rows and columns the outermost taps are away from the centre."""
    height, width = kernel_size
    return height // 2 * dilation, width // 2 * dilation


def output_size(
    size: Sequence[int], kernel_size: Sequence[int], dilation: int, stride: int, upscale: int, padding: str
) -> tuple[int, int]:
    """(Ho, Wo) for an x of `size` (H, W)."""
    radii = reach(kernel_size, dilation) if padding == "valid" else (0, 0)
    height, width = (n - 2 * r for n, r in zip(size, radii, strict=True))
    return -(-height * upscale // stride), -(-width * upscale // stride)


@dataclass(frozen=True)
class Facts(dispatch.Facts):
    """Device, dtype, the number of taps, and their normalization."""

    taps: int = 0
    normalize: str = "none"

    @property
    def form(self) -> str:
        """The number of taps, and their normalization."""
        return f"taps {dispatch.up_to(self.taps, 9, 25)}, normalize {self.normalize}" if self.taps else ""


class Arguments(NamedTuple):
    """The op's arguments before `backend`, as its schema orders them (op.py)."""

    x: torch.Tensor  # [B, C, H, W]
    kernel: torch.Tensor  # [B, groups kh kw, Ho, Wo], any strides
    kernel_size: Sequence[int]  # (kh, kw)
    groups: int
    dilation: Sequence[int]
    stride: int
    upscale: int
    padding: str
    normalize: str
    alpha: float
    beta: float
    gamma: float
    log_window: torch.Tensor | None  # [kh, kw]

    def facts(self) -> Facts:
        """What decides on the backend."""
        return Facts(self.x.device, self.x.dtype, math.prod(self.kernel_size), self.normalize)

    def out_shape(self) -> tuple[int, ...]:
        """[dilations, B, C, Ho, Wo]."""
        return len(self.dilation), *self.x.shape[:2], *self.kernel.shape[2:]

    def check(self) -> None:
        """Raises unless the options are valid and the tensors fit them, which keeps kernels in bounds."""
        x, kernel = self.x, self.kernel
        check_tensors(x, kernel)
        kh, kw = check_kernel_size(self.kernel_size, pair=True)
        check_options(self.dilation, self.stride, self.upscale, self.padding, self.normalize)
        groups, channels = self.groups, x.shape[1]
        require(groups > 0 and channels % groups == 0, "groups", f"divide x's {channels} channels", groups)
        if kernel.shape[1] != groups * kh * kw:
            rule = f"have {groups} groups x {kh * kw} = {groups * kh * kw} channels"
            require(False, "kernel", rule, shape(kernel))
        self._check_size()
        if kernel.dtype != x.dtype:
            require(False, "kernel", f"have x's dtype {x.dtype}", kernel.dtype)
        check_window(self.log_window, x, self.kernel_size, self.normalize)

    def _check_size(self):
        x, dilation = self.x, max(self.dilation)
        sides, radii = x.shape[2:], reach(self.kernel_size, dilation)
        if self.padding == "valid":
            require(len(self.dilation) == 1, "dilation", "have one value with padding='valid'", tuple(self.dilation))
            fits = all(side > 2 * r for side, r in zip(sides, radii, strict=True))
            require(fits, "x", f"be larger than {[2 * r for r in radii]} with padding='valid'", shape(x))
        if self.padding == "reflect":
            fits = all(side > r for side, r in zip(sides, radii, strict=True))
            require(fits, "x", f"have sides longer than the reach {list(radii)} with padding='reflect'", shape(x))
        expected = output_size(sides, self.kernel_size, dilation, self.stride, self.upscale, self.padding)
        if self.kernel.shape[2:] != expected:
            require(False, "kernel", f"have the output's size {list(expected)}", shape(self.kernel))

    def check_gradient(self, grad: torch.Tensor) -> None:
        """Raises unless `grad` is like the output."""
        require_match(grad, "grad", self.out_shape(), self.x.dtype, self.x.device)


def check_tensors(x: torch.Tensor, kernel: torch.Tensor) -> None:
    """Raises unless x and kernel are tensors of four dimensions on one device, of one batch size."""
    require_tensor(x, "x", dims=(4,))
    require(min(x.shape[1:]) > 0, "x", "have at least one channel and one pixel, [B, C, H, W]", shape(x))
    require_tensor(kernel, "kernel", dims=(4,), like=x)
    require(len(kernel) == len(x), "kernel", f"have x's batch of {len(x)}", shape(kernel))


def check_kernel_size(kernel_size: int | Sequence[int], pair: bool = False) -> tuple[int, ...]:
    """(kh, kw), both odd, from K or a pair; pair: from a pair only."""
    sides = check_positive(kernel_size, "kernel_size")
    sides = sides * 2 if len(sides) == 1 and not pair else sides
    fits = len(sides) == 2 and all(n % 2 for n in sides)
    require(fits, "kernel_size", "be (kh, kw), both odd" if pair else "be K or (kh, kw), both odd", kernel_size)
    return sides


def check_window(log_window: torch.Tensor | None, x: torch.Tensor, kernel_size: Sequence[int], normalize: str) -> None:
    """Raises unless log_window is None or, with a softmax, a constant floating-point tensor [kh, kw]."""
    if log_window is not None:
        require_tensor(log_window, "log_window", dims=(2,), like=x)
        fits = log_window.shape == tuple(kernel_size)
        require(fits, "log_window", f"have shape {list(kernel_size)}", shape(log_window))
        require(normalize != "none", "log_window", "be None without a softmax (normalize='none')", "a tensor")
        require(not log_window.requires_grad, "log_window", "be a constant", "a tensor that requires a gradient")


def check_positive(value: int | Sequence[int], name: str) -> tuple[int, ...]:
    """A positive integer, or a sequence of them, as a tuple."""
    values = (value,) if isinstance(value, int) else value
    fits = isinstance(values, (tuple, list)) and len(values) > 0 and all(map(is_positive_int, values))
    require(fits, name, "be a positive integer or a tuple of them", repr(value))
    return tuple(values)


def check_options(
    dilation: int | Sequence[int], stride: int, upscale: int, padding: str, normalize: str
) -> tuple[int, ...]:
    """The dilations as a tuple; raises unless every option has a valid value."""
    for value, name in ((stride, "stride"), (upscale, "upscale")):
        require(is_positive_int(value), name, "be a positive integer", repr(value))
    for option, name, known in ((padding, "padding", PADDINGS), (normalize, "normalize", NORMALIZATIONS)):
        if option not in known:
            require(False, name, f"be one of {', '.join(known)}", repr(option))
    return check_positive(dilation, "dilation")
