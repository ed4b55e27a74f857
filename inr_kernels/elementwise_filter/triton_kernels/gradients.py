"""The backward kernels of elementwise_filter for any number of taps, with intermediate results in memory."""

import triton
import triton.language as tl

from .pixels import NONE, load_logits, load_tap, split


@triton.jit
def kernel_gradient(
    d_kernel,  # [B, G T, P]; float32 with ADD
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
        tl.store(at, d.to(d_kernel.dtype.element_ty), mask=live)


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
