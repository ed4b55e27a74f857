"""The forward kernel of elementwise_filter, and the log-sum-exp of the logits."""

import triton
import triton.language as tl

from .pixels import ALL, TAPS, load_logits, load_tap, split


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
