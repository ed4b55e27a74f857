"""The backward kernel of elementwise_filter for few taps, whose weights stay in registers."""

# mypy: disable-error-code="assignment, misc"
# Tuples grow in the kernels.
import triton
import triton.language as tl

from .pixels import NONE, REFLECT, REPLICATE, fold


@triton.jit
def folded_weight(
    weights, x, n, t: tl.constexpr, o: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """The weight of tap t, which is o pixels from the centre, and of taps beyond the border that read the same pixel.

    Tap -beyond of the pixel q at the lower border reads the pixel q + o, tap +beyond the same at the upper border.
    """
    weight = weights[t]
    for beyond in tl.static_range(1, R + 1):
        if PADDING == REPLICATE:
            if o <= 0 and -o < beyond:
                weight += tl.where(x == -o, weights[t + (-beyond - o) * STEP], 0.0)
            if o >= 0 and o < beyond:
                weight += tl.where(x == n - 1 - o, weights[t + (beyond - o) * STEP], 0.0)
        if PADDING == REFLECT:
            if (beyond - o) % 2 == 0 and o > -beyond and o <= beyond:
                weight += tl.where(x == (beyond - o) // 2, weights[t + (-beyond - o) * STEP], 0.0)
            if (beyond + o) % 2 == 0 and o < beyond and o >= -beyond:
                weight += tl.where(x == n - 1 - (beyond + o) // 2, weights[t + (beyond - o) * STEP], 0.0)
    return weight


@triton.jit
def folded(weights, x, n, KH: tl.constexpr, KW: tl.constexpr, STEP: tl.constexpr, PADDING: tl.constexpr):
    """The weights of a tile's taps, those of taps beyond the border added to taps that read the same pixel.

    Along one axis, on which x are the pixels' coordinates, of n, and taps are STEP apart: 1 or KW. Only for a dilation
    of 1, where there are such taps. Weights of taps beyond the border remain: they belong to no pixel.
    """
    result = ()
    for t in tl.static_range(KH * KW):
        if STEP == 1:
            result += (folded_weight(weights, x, n, t, t % KW - KW // 2, KW // 2, STEP, PADDING),)
        else:
            result += (folded_weight(weights, x, n, t, t // KW - KH // 2, KH // 2, STEP, PADDING),)
    return result


@triton.jit
def pick(values, n):
    """values[n] for an n that is known at run time only."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(n == i, values[i], value)
    return value


@triton.jit
def place(
    oy, ox, t: tl.constexpr, size, dilation, stride, upscale, origin, KH: tl.constexpr, KW: tl.constexpr,
    PADDING: tl.constexpr,
):  # fmt: skip
    """The place in [H, W] of the input pixel that tap t of the output pixel (oy, ox) reads, and whether there is one.

    The middle row and column of taps need no padding, so that the compiler sees that their pixels are contiguous.
    """
    y, x = oy * stride // upscale + origin[0], ox * stride // upscale + origin[1]
    inside = y == y
    if t // KW != KH // 2:
        y, inside = fold(y + (t // KW - KH // 2) * dilation, size[0], PADDING)
    if t % KW != KW // 2:
        x, inside_x = fold(x + (t % KW - KW // 2) * dilation, size[1], PADDING)
        inside &= inside_x
    return y * size[1] + x, inside


@triton.jit
def gradients(
    d_kernel,  # [B, G T, Ho, Wo]; or None
    d_x,  # [B, G CG, H, W]; or None
    lse,  # [B, G, Ho, Wo] float32, to write; or None
    grad,  # [D, B, G CG, Ho, Wo] contiguous
    x,  # [B, G CG, H, W] contiguous
    kernel,  # [B, G T, Ho, Wo], by strides
    window,  # [T] float32; or None
    strides, G, CG, channels, size, out_size, dilations, stride, upscale, origin, tiles, first_y,
    alpha, beta, gamma, KH: tl.constexpr, KW: tl.constexpr, PADDING: tl.constexpr, NORMALIZE: tl.constexpr,
    FIRST_X: tl.constexpr, HALO_Y: tl.constexpr, HALO_X: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
):  # fmt: skip
    """d_kernel = s (d - sum_t s d) with softmax weights s and d = gamma sum_c grad x; without a softmax it is d.

    d_x = sum_t grad (gamma s + beta) + alpha grad, from the output pixels that read a pixel; at stride and upscale 1.
    A program takes a tile of TY x TX output pixels of one group of one image, and all channels of the group. It has
    the gradients of all its pixels but those of a halo, which other programs have, too.

    channels: of all images. tiles: along y and x. first_y, FIRST_X: the pixel at which the first tile,
    with its halo, starts.
    """
    program = tl.program_id(0)
    tile, unit = program % (tiles[0] * tiles[1]), (program // (tiles[0] * tiles[1])).to(tl.int64)
    i = tl.arange(0, TY * TX)
    row, column = i // TX, i % TX
    oy = first_y + tile // tiles[1] * (TY - 2 * HALO_Y) + row
    ox = FIRST_X + tile % tiles[1] * (TX - 2 * HALO_X) + column
    live = (oy >= 0) & (oy < out_size[0]) & (ox >= 0) & (ox < out_size[1])
    own = (row >= HALO_Y) & (row < TY - HALO_Y) & (column >= HALO_X) & (column < TX - HALO_X)
    P, stride_t = out_size[0] * out_size[1] + 0 * unit, strides[1] + 0 * unit  # 64 bits: of many taps of large maps
    pixels = oy * out_size[1] + ox
    grad += pixels

    d = ()
    for _ in tl.static_range(KH * KW):
        d += (tl.zeros([TY * TX], tl.float32),)
    if d_kernel is not None:
        for n in range(len(dilations) * CG):
            dilation, c = pick(dilations, n // CG), n % CG
            g = tl.load(grad + (n // CG * channels + unit * CG + c) * P, mask=live, other=0.0).to(tl.float32)
            sums = ()
            for t in tl.static_range(KH * KW):
                to, inside = place(oy, ox, t, size, dilation, stride, upscale, origin, KH, KW, PADDING)
                z = tl.load(x + (unit * CG + c) * size[0] * size[1] + to, mask=live & inside, other=0.0)
                sums += (d[t] + g * z.to(tl.float32),)
            d = sums

    at = kernel + unit // G * strides[0] + unit % G * KH * KW * stride_t
    at += oy.to(tl.int64) * strides[2] + ox.to(tl.int64) * strides[3]
    weights = ()
    for t in tl.static_range(KH * KW):
        weight = tl.load(at + t * stride_t, mask=live, other=0.0).to(tl.float32)
        if window is not None:
            weight += tl.load(window + t)
        weights += (weight,)
    if NORMALIZE != NONE:
        max_logit = weights[0]
        for t in tl.static_range(1, KH * KW):
            max_logit = tl.maximum(max_logit, weights[t])
        powers, total = (), tl.zeros([TY * TX], tl.float32)
        for t in tl.static_range(KH * KW):
            powers += (tl.exp(weights[t] - max_logit),)
            total += powers[t]
        if lse is not None:
            tl.store(lse + unit * P + pixels, max_logit + tl.log(total), mask=live & own)
        weights, factor = (), 1 / total
        for t in tl.static_range(KH * KW):
            weights += (powers[t] * factor,)

    if d_kernel is not None:
        mean = tl.zeros([TY * TX], tl.float32)
        if NORMALIZE != NONE:
            for t in tl.static_range(KH * KW):
                mean += weights[t] * d[t]
        d_kernel += unit * KH * KW * P + pixels
        for t in tl.static_range(KH * KW):
            result = gamma * (d[t] - mean)
            if NORMALIZE != NONE:
                result *= weights[t]
            tl.store(d_kernel + t * P, result.to(d_kernel.dtype.element_ty), mask=live & own)

    if d_x is not None:
        factors = ()
        for t in tl.static_range(KH * KW):
            factors += (gamma * weights[t] + (beta + alpha if t == KH * KW // 2 else beta),)
        factors = folded(factors, ox, out_size[1], KH, KW, 1, PADDING)
        factors = folded(factors, oy, out_size[0], KH, KW, KW, PADDING)
        y, z = oy + origin[0], ox + origin[1]
        mask = own & (y >= 0) & (y < size[0]) & (z >= 0) & (z < size[1])
        d_x += y * size[1] + z
        for c in range(CG):
            total = tl.zeros([TY * TX], tl.float32)
            for n in range(len(dilations)):
                dilation = pick(dilations, n)
                g = tl.load(grad + (n * channels + unit * CG + c) * P, mask=live, other=0.0).to(tl.float32)
                for t in tl.static_range(KH * KW):
                    shift_y, shift_x = (t // KW - KH // 2) * dilation, (t % KW - KW // 2) * dilation
                    part = g * factors[t]
                    if t != KH * KW // 2:
                        # The pixel that reads this one with tap t, modulo the tile. With a halo it is in the tile.
                        part = tl.gather(part, (i - shift_y * TX - shift_x) & (TY * TX - 1), 0)
                        if HALO_Y == 0:
                            part = tl.where((row >= shift_y) & (row < TY + shift_y), part, 0.0)
                        if HALO_X == 0:
                            part = tl.where((column >= shift_x) & (column < TX + shift_x), part, 0.0)
                    total += part
            tl.store(d_x + (unit * CG + c) * size[0] * size[1], total.to(d_x.dtype.element_ty), mask=mask)
