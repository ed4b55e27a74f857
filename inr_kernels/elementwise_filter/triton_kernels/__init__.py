"""The Triton backend of elementwise_filter: kernels, launches and block sizes.

A program takes BP output (or input) pixels of one group of one image and up to BC of the group's channels; each
dilation has a separate launch. The backward of up to MAX_TAPS taps is one kernel (one_pass.py), which keeps the weights
of a tile of pixels in registers; the gradient of the image is computed by another where a group has many channels or
the output another grid. With more taps, or one softmax over all groups, the softmax's gradient needs for each pixel the
sum of gradient times filtered value, which is computed from the forward's output in float32. No kernel uses atomics.

B images, G groups of CG channels, an output of P = Ho Wo pixels, T = KH KW taps.

Tested in Triton's interpreter and compiled ahead of time (tests/build/test_compile_only.py); not run on a GPU.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from inr_kernels._core import backends
from inr_kernels._core.backends import PADDINGS
from inr_kernels._core.dispatch import Facts

from ..arguments import NORMALIZATIONS, reach
from .filter import filter_pixels, logsumexp
from .gradients import image_gradient, kernel_gradient
from .one_pass import gradients

BP = 128  # pixels of a program
MAX_TAPS = 25  # of the backward in one pass


def why_not(facts: Facts) -> str:
    """Why the kernels cannot run, "" if they can."""
    if facts.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {str(facts.dtype).removeprefix('torch.')}"
    return ""


class Tile(NamedTuple):
    """A tile of output pixels with its halo on each side, the first one's first pixel, and how many; (y, x)."""

    size: tuple[int, int]
    halo: tuple[int, int]
    first: tuple[int, int]
    counts: tuple[int, int]


def smallest_cover(
    sides: Sequence[int], margin: Sequence[int], halo: Sequence[int], align: Sequence[int], pixels: int
) -> Tile | None:
    """The tiles of at most `pixels` pixels that cover a map and its margin with the fewest pixels, the halos included.

    An axis that one tile covers needs no halo. None where less than a third of a tile would be outside its halo.
    """
    covers = []
    for power in range(pixels.bit_length()):
        size, halos, firsts, counts, inner = [], [], [], [], 1
        for n, m, h, a, most in zip(sides, margin, halo, align, (pixels >> power, 1 << power), strict=True):
            first = -triton.cdiv(m, a) * a
            extent = n + m - first
            side = min(most, triton.next_power_of_2(extent))
            wide = 0 if extent <= side else triton.cdiv(h, a) * a
            size.append(side)
            halos.append(wide)
            firsts.append(first - wide)
            inner *= max(0, side - 2 * wide)
            counts.append(triton.cdiv(extent, max(1, side - 2 * wide)))
        if 3 * inner >= math.prod(size):
            covers.append(Tile(*map(tuple, (size, halos, firsts, counts))))
    return min(covers, key=lambda tile: (math.prod(tile.size) * math.prod(tile.counts), -tile.size[1]), default=None)


class _Problem:
    """A call's tensors and sizes, and its launches."""

    def __init__(
        self, x, kernel, kernel_size, groups, dilation, stride, upscale, padding, normalize, alpha, beta, gamma, window
    ):
        self.x, self.kernel = x.contiguous(), kernel
        self.window = None if window is None else window.float().contiguous()
        self.groups, self.per_group = groups, x.shape[1] // groups
        self.dilations, self.stride, self.upscale = dilation, stride, upscale
        self.sides, self.padding, self.normalize = kernel_size, padding, normalize
        self.coefficients = alpha, beta, gamma
        self.taps = kernel_size[0] * kernel_size[1]
        self.values = 4 if self.taps <= 9 else 2  # pixels of a thread in one pass: more would spill registers
        self.out_size = tuple(kernel.shape[2:])
        self.pixels = self.out_size[0] * self.out_size[1]
        self.size = *x.shape[2:], self.out_size[1]
        self.block = min(8, triton.next_power_of_2(self.per_group))
        self.parts = triton.cdiv(self.per_group, self.block)
        self.softmax_groups = 1 if normalize == "all" else groups

    def programs(self, pixels, parts=None):
        return (triton.cdiv(pixels, BP) * len(self.x) * self.groups * (parts or self.parts),)

    def origin(self, dilation):
        return reach(self.sides, dilation) if self.padding == "valid" else (0, 0)

    def geometry(self, dilation):
        return self.size, dilation, self.stride, self.upscale, self.origin(dilation)

    def forms(self):
        forms = {"KH": self.sides[0], "KW": self.sides[1], "NORMALIZE": NORMALIZATIONS[self.normalize]}
        return forms | {"BP": BP, "BC": self.block, "enable_fp_fusion": True}

    def lse(self):
        """[B, softmax groups, Ho, Wo] float32."""
        groups, n = self.softmax_groups, self.kernel.shape[1] // self.softmax_groups
        lse = self.new_lse(groups)
        logsumexp[(triton.cdiv(self.pixels, BP) * len(self.x) * groups,)](
            lse,
            self.kernel,
            self.window,
            self.kernel.stride(),
            groups,
            self.pixels,
            self.out_size[1],
            n,
            self.taps,
            BP=BP,
        )
        return lse

    def new_lse(self, groups):
        return self.x.new_empty(len(self.x), groups, *self.out_size, dtype=torch.float32)

    def filter(self, out, lse, coefficients):
        for part, dilation in zip(out, self.dilations, strict=True):
            filter_pixels[self.programs(self.pixels)](
                part, self.x, self.kernel, self.window, lse, self.kernel.stride(), self.groups, self.per_group,
                self.pixels, *self.geometry(dilation), *coefficients, PADDING=PADDINGS[self.padding], **self.forms(),
            )  # fmt: skip
        return out

    def one_pass(self, grad, needs_x, needs_kernel):
        """(d_x or None, d_kernel or None, lse or None): what the kernel of few taps computes.

        Without d_x, where that is needed, it stores the log-sum-exp for the kernel that computes it.
        """
        tile = self.halo_tile() if needs_x else None
        if not (tile or needs_kernel):
            return None, None, None
        d_kernel = grad.new_empty(self.kernel.shape) if needs_kernel else None
        d_x, lse = torch.empty_like(self.x) if tile else None, None
        if needs_x and not tile and self.normalize != "none":
            lse = self.new_lse(self.groups)
        tile = tile or smallest_cover(self.out_size, (0, 0), (0, 0), (1, 1), 4 * 32 * self.values)
        warps = max(1, math.prod(tile.size) // (32 * self.values))
        gradients[(math.prod(tile.counts) * len(self.x) * self.groups,)](
            d_kernel, d_x, lse, grad, self.x, self.kernel, self.window, self.kernel.stride(), self.groups,
            self.per_group, len(self.x) * self.groups * self.per_group, tuple(self.x.shape[2:]), self.out_size,
            tuple(self.dilations), self.stride, self.upscale, self.origin(self.dilations[0]), tile.counts,
            tile.first[0], *self.coefficients, KH=self.sides[0], KW=self.sides[1], PADDING=PADDINGS[self.padding],
            NORMALIZE=NORMALIZATIONS[self.normalize], FIRST_X=tile.first[1], HALO_Y=tile.halo[0], HALO_X=tile.halo[1],
            TY=tile.size[0], TX=tile.size[1], num_warps=warps,
        )  # fmt: skip
        return d_x, d_kernel, lse

    def halo_tile(self):
        """The tile with which one pass computes d_x, too; None where it is better computed by a kernel of its own.

        That is where the output has another grid, more channels share the logits than should wait for each other,
        most of a tile would be halo, or a tap beyond the border reads a pixel that no other tap does.
        """
        folds = self.padding in ("replicate", "reflect") and max(self.dilations) > 1
        if folds or (self.stride, self.upscale) != (1, 1) or self.per_group > 4 or self.coefficients[2] == 0:
            return None
        margin = self.origin(self.dilations[0])
        halo = reach(self.sides, max(self.dilations))
        return smallest_cover(self.out_size, margin, halo, (1, self.values), 8 * 32 * self.values)

    def kernel_gradient(self, grad, lse):
        means = None
        if lse is not None:
            filtered = self.filter(
                grad.new_empty(grad.shape, dtype=torch.float32), lse, (0.0, 0.0, self.coefficients[2])
            )
            means = (grad * filtered).unflatten(2, (self.softmax_groups, -1)).sum(3)
        exact = torch.float32 if len(self.dilations) > 1 else grad.dtype
        d_kernel = grad.new_empty(self.kernel.shape, dtype=exact)
        for i, (part, dilation) in enumerate(zip(grad, self.dilations, strict=True)):
            kernel_gradient[self.programs(self.pixels, 1)](
                d_kernel, part, self.x, self.kernel, self.window, lse, None if means is None else means[i],
                self.kernel.stride(), self.groups, self.softmax_groups, self.per_group, self.pixels,
                *self.geometry(dilation), self.coefficients[2], PADDING=PADDINGS[self.padding], ADD=i > 0,
                **self.forms(),
            )  # fmt: skip
        return d_kernel.to(grad.dtype)

    def image_gradient(self, grad, lse):
        folds = self.padding in ("replicate", "reflect")
        top, left = reach(self.sides, max(self.dilations)) if folds else (0, 0)
        height, width = self.x.shape[2:]
        virtual = height + 2 * top, width + 2 * left
        d = grad.new_zeros(*self.x.shape[:2], *virtual, dtype=torch.float32)
        for part, dilation in zip(grad, self.dilations, strict=True):
            image_gradient[self.programs(virtual[0] * virtual[1])](
                d, part, self.kernel, self.window, lse, self.kernel.stride(), self.groups, self.softmax_groups,
                self.per_group, self.pixels, self.out_size, (*virtual, top, left), dilation, self.stride, self.upscale,
                self.origin(dilation), *self.coefficients, **self.forms(),
            )  # fmt: skip
        d = _fold(d, 2, top, height, self.padding)
        return _fold(d, 3, left, width, self.padding).to(grad.dtype).contiguous()


def _fold(d, dim, reach, n, padding):
    """Adds the padding at both ends of an axis to the pixels that it repeats."""
    if not reach:
        return d
    low, inner, high = d.split((reach, n, reach), dim)
    if padding == "replicate":
        inner.narrow(dim, 0, 1).add_(low.sum(dim, keepdim=True))
        inner.narrow(dim, n - 1, 1).add_(high.sum(dim, keepdim=True))
    else:
        inner.narrow(dim, 1, reach).add_(low.flip(dim))
        inner.narrow(dim, n - 1 - reach, reach).add_(high.flip(dim))
    return inner


def forward(*args: Any) -> torch.Tensor:
    """Takes the op's arguments (op.py), returns [len(dilation), B, C, Ho, Wo]."""
    p = _Problem(*args)
    out = p.x.new_empty(len(p.dilations), *p.x.shape[:2], *p.out_size)
    if not out.numel():
        return out
    with backends.on(out.device):
        return p.filter(out, p.lse() if p.normalize == "all" else None, p.coefficients)


def backward(
    grad: torch.Tensor, *args: Any, needs_x: bool, needs_kernel: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Takes the output's gradient and the op's arguments, returns (d_x or None, d_kernel or None)."""
    p = _Problem(*args)
    grad = grad.contiguous()
    if not grad.numel():
        return torch.zeros_like(p.x) if needs_x else None, torch.zeros_like(p.kernel) if needs_kernel else None
    with backends.on(grad.device):
        d_x, d_kernel, lse = None, None, None
        if p.taps <= MAX_TAPS and p.normalize != "all":
            d_x, d_kernel, lse = p.one_pass(grad, needs_x, needs_kernel)
        if lse is None and p.normalize != "none" and ((needs_x and d_x is None) or (needs_kernel and d_kernel is None)):
            lse = p.lse()
        if needs_x and d_x is None:
            d_x = p.image_gradient(grad, lse)
        if needs_kernel and d_kernel is None:
            d_kernel = p.kernel_gradient(grad, lse)
        return d_x, d_kernel
