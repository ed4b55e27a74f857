"""What the kernels of elementwise_filter share: their programs' pixels, paddings, and loads."""

import triton
import triton.language as tl

from inr_kernels._core.backends import PADDINGS

from ..arguments import NORMALIZATIONS

REPLICATE, REFLECT = tl.constexpr(PADDINGS["replicate"]), tl.constexpr(PADDINGS["reflect"])
NONE, TAPS, ALL = (tl.constexpr(NORMALIZATIONS[name]) for name in ("none", "taps", "all"))


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
