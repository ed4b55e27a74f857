"""The Triton backend of elementwise_filter: kernels, launches and block sizes.

A program takes BP output (or input) pixels of one group of one image and up to BC of the group's channels. No kernel
uses atomics. Each dilation has a separate launch. The softmax's gradient needs, for each pixel, the sum of gradient
times filtered value, which is computed from the forward's output in float32.

B images, G groups of CG channels, an output of P = Ho Wo pixels, T = KH KW taps.

Tested in Triton's interpreter and compiled ahead of time (tests/build/test_compile_only.py); not run on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from inr_kernels._core import backends
from inr_kernels._core.backends import PADDINGS
from inr_kernels._core.dispatch import Facts

from .arguments import NORMALIZATIONS, reach

BP = 128  # pixels of a program
REPLICATE, REFLECT = tl.constexpr(PADDINGS["replicate"]), tl.constexpr(PADDINGS["reflect"])
NONE, TAPS, ALL = (tl.constexpr(NORMALIZATIONS[name]) for name in ("none", "taps", "all"))


def why_not(facts: Facts) -> str:
    """Why the kernels cannot run, "" if they can."""
    if facts.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {str(facts.dtype).removeprefix('torch.')}"
    return ""


@triton.jit
def split(count, parts, G, BP: tl.constexpr, BC: tl.constexpr):
    """The program's pixels [BP], its image, its group and its channels within the group [BC]."""
    program, blocks = tl.program_id(0), tl.cdiv(count, BP)
    pixel = (program % blocks).to(tl.int64) * BP + tl.arange(0, BP)
    unit = program // blocks
    channel = unit % parts * BC + tl.arange(0, BC)
    return pixel, (unit // parts // G).to(tl.int64), (unit // parts % G).to(tl.int64), channel


@triton.jit
def fold(v, n, PADDING: tl.constexpr):
    """The index of the pixel that padding places at v on an axis of n pixels, and whether there is one."""
    inside = (v >= 0) & (v < n)
    if PADDING == REPLICATE:
        v, inside = tl.minimum(tl.maximum(v, 0), n - 1), v == v
    if PADDING == REFLECT:
        v, inside = tl.where(v < 0, -v, tl.where(v < n, v, 2 * (n - 1) - v)), v == v
    return v, inside


@triton.jit
def load_logits(
    kernel,  # [B, G T, Ho, Wo], by strides
    window,  # [T] float32; or None
    pixels, image, channel, t, W, strides, mask,
):  # fmt: skip
    """A channel of the kernel at the output pixels [BP] of width W, plus the window's value for tap t: float32 [BP]."""
    at = kernel + image * strides[0] + channel * strides[1] + pixels // W * strides[2] + pixels % W * strides[3]
    logits = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if window is not None:
        logits += tl.load(window + t)
    return logits


@triton.jit
def load_tap(
    x,  # [CG, H, W]: one group of one image
    pixels, channels, t, size, dilation, stride, upscale, origin, KH, KW, PADDING: tl.constexpr, mask,
):  # fmt: skip
    """The input pixels that tap t of the output pixels [BP] reads, in the channels [BC]: float32 [BC, BP].

    size: (H, W, Wo); origin: the input pixel of the output's first pixel.
    """
    H, W, OW = size
    y, inside_y = fold(pixels // OW * stride // upscale + origin[0] + (t // KW - KH // 2) * dilation, H, PADDING)
    z, inside_z = fold(pixels % OW * stride // upscale + origin[1] + (t % KW - KW // 2) * dilation, W, PADDING)
    at = x + channels.to(tl.int64)[:, None] * H * W + (y * W + z)[None, :]
    return tl.load(at, mask=mask & (inside_y & inside_z)[None, :], other=0.0).to(tl.float32)


@triton.jit
def logsumexp(
    lse,  # [B, G, P] float32
    kernel,  # [B, G n, Ho, Wo], by strides
    window,  # [T] float32; or None
    strides, G, P, W, n, T, BP: tl.constexpr,
):  # fmt: skip
    """The log of the sum of exponentials over the n channels of a group; G = 1 where one softmax spans all groups."""
    pixels, image, group, _ = split(P, 1, G, BP, 1)
    mask = pixels < P
    max_logit = tl.full([BP], float("-inf"), tl.float32)
    for t in range(n):
        logits = load_logits(kernel, window, pixels, image, group * n + t, t % T, W, strides, mask)
        max_logit = tl.maximum(max_logit, logits)
    total = tl.zeros([BP], tl.float32)
    for t in range(n):
        logits = load_logits(kernel, window, pixels, image, group * n + t, t % T, W, strides, mask)
        total += tl.exp(logits - max_logit)
    tl.store(lse + (image * G + group) * P + pixels, max_logit + tl.log(total), mask=mask)


@triton.jit
def filter_pixels(
    out,  # [B, G CG, P]
    x,  # [B, G CG, H, W] contiguous
    kernel,  # [B, G T, Ho, Wo], by strides
    window,  # [T] float32; or None
    lse,  # [B, P] float32 where one softmax spans all groups; else None
    strides, G, CG, P, size, dilation, stride, upscale, origin, alpha, beta, gamma,
    KH: tl.constexpr, KW: tl.constexpr, PADDING: tl.constexpr, NORMALIZE: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = alpha x + beta box + gamma filtered.

    A softmax over the taps runs online, with the state (max_logit, total, sums): every logit is read once.
    """
    pixels, image, group, channels = split(P, tl.cdiv(CG, BC), G, BP, BC)
    live = pixels < P
    mask = (channels < CG)[:, None] & live[None, :]
    x += (image * G + group) * CG * size[0] * size[1]
    max_logit, total = tl.full([BP], float("-inf"), tl.float32), tl.zeros([BP], tl.float32)
    sums = tl.zeros([BC, BP], tl.float32)
    box = sums
    if NORMALIZE == ALL:
        shift = tl.load(lse + image * P + pixels, mask=live, other=0.0)
    for t in tl.range(KH * KW, loop_unroll_factor=3):  # unrolling all of 25 or 81 taps would spill
        z = load_tap(x, pixels, channels, t, size, dilation, stride, upscale, origin, KH, KW, PADDING, mask)
        weight = load_logits(kernel, window, pixels, image, group * KH * KW + t, t, size[2], strides, live)
        if NORMALIZE == TAPS:
            new_max = tl.maximum(max_logit, weight)
            new_max = tl.where(weight != weight, weight, new_max)
            rescale = tl.where(new_max == float("-inf"), 0.0, tl.exp(max_logit - new_max))
            weight = tl.where(weight == float("-inf"), 0.0, tl.exp(weight - new_max))
            total = total * rescale + weight
            sums *= rescale[None, :]
            max_logit = new_max
        if NORMALIZE == ALL:
            weight = tl.exp(weight - shift)
        sums += weight[None, :] * z
        box += z
    if NORMALIZE == TAPS:
        sums /= total[None, :]
    result = tl.zeros([BC, BP], tl.float32)
    if gamma != 0:
        result += gamma * sums
    if beta != 0:
        result += beta * box
    if alpha != 0:
        t = KH * KW // 2
        centre = load_tap(x, pixels, channels, t, size, dilation, stride, upscale, origin, KH, KW, PADDING, mask)
        result += alpha * centre
    at = out + ((image * G + group) * CG + channels)[:, None] * P + pixels[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def kernel_gradient(
    d_kernel,  # [B, G T, P] float32
    grad,  # [B, G CG, P] contiguous
    x,  # [B, G CG, H, W] contiguous
    kernel,  # [B, G T, Ho, Wo], by strides
    window,  # [T] float32; or None
    lse,  # [B, LG, P] float32 with a softmax, LG = 1 where it spans all groups, else G; without one None
    means,  # [B, LG, P] float32: sum of gradient times filtered value; or None
    strides, G, LG, CG, P, size, dilation, stride, upscale, origin,
    gamma, KH: tl.constexpr, KW: tl.constexpr, PADDING: tl.constexpr, NORMALIZE: tl.constexpr, ADD: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d_kernel = s (gamma sum_c grad x - means) with softmax weights s; without a softmax gamma sum_c grad x.

    ADD: adds it to what d_kernel holds.
    """
    pixels, image, group, channels = split(P, 1, G, BP, BC)
    live = pixels < P
    x += (image * G + group) * CG * size[0] * size[1]
    grad += (image * G + group) * CG * P
    if NORMALIZE != NONE:
        unit = (image * LG + group % LG) * P + pixels
        shift, mean = tl.load(lse + unit, mask=live, other=0.0), tl.load(means + unit, mask=live, other=0.0)
    for t in range(KH * KW):
        d = tl.zeros([BP], tl.float32)
        for first in range(0, CG, BC):
            c = first + channels
            mask = (c < CG)[:, None] & live[None, :]
            g = tl.load(grad + c.to(tl.int64)[:, None] * P + pixels[None, :], mask=mask, other=0.0).to(tl.float32)
            z = load_tap(x, pixels, c, t, size, dilation, stride, upscale, origin, KH, KW, PADDING, mask)
            d += tl.sum(g * z, 0)
        d *= gamma
        if NORMALIZE != NONE:
            logits = load_logits(kernel, window, pixels, image, group * KH * KW + t, t, size[2], strides, live)
            d = tl.exp(logits - shift) * (d - mean)
        at = d_kernel + ((image * G + group) * KH * KW + t) * P + pixels
        if ADD:
            d += tl.load(at, mask=live)
        tl.store(at, d, mask=live)


@triton.jit
def image_gradient(
    d_x,  # [B, G CG, VH, VW] float32, read and written
    grad,  # [B, G CG, P] contiguous
    kernel,  # [B, G T, Ho, Wo], by strides
    window,  # [T] float32; or None
    lse,  # [B, LG, P] float32 with a softmax, LG = 1 where it spans all groups, else G; without one None
    strides, G, LG, CG, P, size, virtual, dilation, stride, upscale, origin,
    alpha, beta, gamma, KH: tl.constexpr, KW: tl.constexpr, NORMALIZE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d_x += sum_t grad (gamma s_t + beta) + alpha grad over the output pixels that read a pixel; size: (Ho, Wo).

    virtual: (VH, VW, top, left) of the padded image, whose borders are folded afterwards.
    """
    VH, VW, top, left = virtual
    pixels, image, group, channels = split(VH * VW, tl.cdiv(CG, BC), G, BP, BC)
    live, y, x = pixels < VH * VW, pixels // VW - top - origin[0], pixels % VW - left - origin[1]
    mask = (channels < CG)[:, None] & live[None, :]
    grad += ((image * G + group) * CG + channels.to(tl.int64))[:, None] * P
    d = d_x + ((image * G + group) * CG + channels.to(tl.int64))[:, None] * VH * VW + pixels[None, :]
    sums = tl.load(d, mask=mask, other=0.0)
    for t in range(KH * KW):
        # The output rows [first_y, last_y) read this row with tap t; columns likewise.
        row, col = y - (t // KW - KH // 2) * dilation, x - (t % KW - KW // 2) * dilation
        reads = live & (row >= 0) & (col >= 0)
        row, col = tl.maximum(row, 0), tl.maximum(col, 0)
        first_y, last_y = tl.cdiv(row * upscale, stride), tl.cdiv((row + 1) * upscale, stride)
        first_x, last_x = tl.cdiv(col * upscale, stride), tl.cdiv((col + 1) * upscale, stride)
        for n in range(tl.cdiv(upscale, stride) * tl.cdiv(upscale, stride)):
            Y, X = first_y + n // tl.cdiv(upscale, stride), first_x + n % tl.cdiv(upscale, stride)
            here = reads & (last_y > Y) & (size[0] > Y) & (last_x > X) & (size[1] > X)
            p = Y * size[1] + X  # may be out of bounds where nothing reads this pixel: every load is masked
            weight = load_logits(kernel, window, p, image, group * KH * KW + t, t, size[1], strides, here)
            if NORMALIZE != NONE:
                weight = tl.exp(weight - tl.load(lse + (image * LG + group % LG) * P + p, mask=here, other=0.0))
            factor = tl.zeros([BP], tl.float32) + beta
            if gamma != 0:
                factor += gamma * weight
            if t == KH * KW // 2:
                factor += alpha
            g = tl.load(grad + p[None, :], mask=mask & here[None, :], other=0.0).to(tl.float32)
            sums += g * factor[None, :]
    tl.store(d, sums, mask=mask)


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
        lse = self.x.new_empty(len(self.x), groups, *self.out_size, dtype=torch.float32)
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

    def filter(self, out, lse, coefficients):
        for part, dilation in zip(out, self.dilations, strict=True):
            filter_pixels[self.programs(self.pixels)](
                part, self.x, self.kernel, self.window, lse, self.kernel.stride(), self.groups, self.per_group,
                self.pixels, *self.geometry(dilation), *coefficients, PADDING=PADDINGS[self.padding], **self.forms(),
            )  # fmt: skip
        return out

    def kernel_gradient(self, grad, lse):
        means = None
        if lse is not None:
            filtered = self.filter(
                grad.new_empty(grad.shape, dtype=torch.float32), lse, (0.0, 0.0, self.coefficients[2])
            )
            means = (grad * filtered).unflatten(2, (self.softmax_groups, -1)).sum(3)
        d_kernel = grad.new_empty(self.kernel.shape, dtype=torch.float32)
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
        lse = None if p.normalize == "none" else p.lse()
        d_x = p.image_gradient(grad, lse) if needs_x else None
        return d_x, p.kernel_gradient(grad, lse) if needs_kernel else None
