"""The backward kernels of neighborhood_attention."""

import triton
import triton.language as tl

from .bias import by_offset, store_offsets
from .tiles import (
    load_tokens,
    masked_max,
    masked_min,
    pixel_of,
    planes_of,
    queries_of_keys,
    scores,
    store_tokens,
    tile,
    window,
)


@triton.jit
def value_products(
    left, left_strides, left_z, left_y, left_x, left_mask, left_head,
    right, right_strides, right_z, right_y, right_x, right_mask, right_head,
    image, dim_v, PRECISION: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
):  # fmt: skip
    """The products [N, BN] of tokens of dim_v channels, in NV blocks."""
    sums = tl.zeros([N, BN], tl.float32)
    for block in range(NV):
        a = load_tokens(left, left_strides, image, left_z, left_head, left_y, left_x, left_mask, block * BV, dim_v, BV)
        b = load_tokens(
            right, right_strides, image, right_z, right_head, right_y, right_x, right_mask, block * BV, dim_v, BV
        )
        sums += tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return sums


@triton.jit
def query_backward(
    d_query,  # [B, D, H, W, heads, dim]; or None
    delta,  # [B, D, H, W, heads] float32
    shares,  # [programs, 1, 2 Kh - 1, 2 Kw - 1] float32: each program's part of d_rpb; or None
    grad,  # [B, D, H, W, heads, dim_v]
    grad_lse,  # [B, D, H, W, heads] float32
    lse,  # [B, D, H, W, heads] float32
    query,  # [B, D, H, W, heads, dim]
    key,  # [B, D, Hk, Wk, heads_k, dim]
    value,  # [B, D, Hk, Wk, heads_v, dim_v]
    rpb,  # [heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1] float32; or None
    d_query_strides, grad_strides, query_strides, key_strides, value_strides,
    size, queries, ratio, heads, share, dim, dim_v, scale, kernel, dilation, stride, grad_scale,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, PRECISION: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    RY: tl.constexpr, RX: tl.constexpr,
):  # fmt: skip
    """delta = sum of weights times their gradients - grad_lse, for a tile of queries; and d_query unless it is None.

    shares needs d_query and Kd = 1; RY, RX: powers of two, at least the rows and columns of a share.
    """
    image, z, head, ry, rx, ny, nx, cy, cx = tile(size, ratio, heads, dilation, TY, TX)
    iy, y, live = pixel_of(cy, ry, ny, queries[1], ratio[1], dilation[1])
    ix, x, live_x = pixel_of(cx, rx, nx, queries[2], ratio[2], dilation[2])
    live &= live_x
    at = (((image * queries[0] + z) * queries[1] + y) * queries[2] + x) * heads + head
    q = load_tokens(query, query_strides, image, z, head, y, x, live, 0, dim, BD)
    if NV == 1:
        g = load_tokens(grad, grad_strides, image, z, head, y, x, live, 0, dim_v, BV)
    shift, mean = tl.load(lse + at, mask=live, other=0.0), -tl.load(grad_lse + at, mask=live, other=0.0)
    y_start, y_end = window(iy, ny, kernel[1], stride[1], CAUSAL_Y)
    x_start, x_end = window(ix, nx, kernel[2], stride[2], CAUSAL_X)
    y_end = tl.where(live, y_end, y_start)
    z_start, z_end = planes_of(z, size, kernel, dilation, stride, CAUSAL_Z)
    rows = masked_min(y_start, live)
    height = tl.maximum(masked_max(y_end, live) - rows, 0)
    count = (z_end - z_start) * height
    sums = tl.zeros([TY * TX, BD], tl.float32)
    bias = tl.zeros([RY, RX], tl.float32)
    for n in range(count * (2 if d_query is not None else 1)):  # a pass for delta, a pass for d_query
        again = n >= count
        n -= tl.where(again, count, 0)
        t, step = rows + n % height, z_start + n // height - z // dilation[0]
        to_z = z + step * dilation[0]
        for c in range(masked_min(x_start, live), masked_max(x_end, live), BN):
            columns = c + tl.arange(0, BN)
            seen = ((t >= y_start) & (t < y_end))[:, None]
            seen &= (columns[None, :] >= x_start[:, None]) & (columns[None, :] < x_end[:, None])
            exists, to_y, to_x = columns < nx, ry + t * dilation[1] + 0 * columns, rx + columns * dilation[2]
            k = load_tokens(key, key_strides, image, to_z, head // share[0], to_y, to_x, exists, 0, dim, BD)
            if NV == 1:
                v = load_tokens(value, value_strides, image, to_z, head // share[1], to_y, to_x, exists, 0, dim_v, BV)
            steps_y, steps_x = (t - iy)[:, None], columns[None, :] - ix[:, None]
            s = scores(q, k, rpb, head, step, steps_y, steps_x, seen, scale, kernel, PRECISION)
            weights = tl.exp(s - shift[:, None])
            if NV == 1:
                d = tl.dot(g, tl.trans(v), input_precision=PRECISION)
            else:
                d = value_products(
                    grad, grad_strides, z, y, x, live, head,
                    value, value_strides, to_z, to_y, to_x, exists, head // share[1],
                    image, dim_v, PRECISION, TY * TX, BN, BV, NV,
                )  # fmt: skip
            d = tl.where(seen, grad_scale * d, 0.0)
            if again:
                d = weights * (d - mean[:, None])
                sums += tl.dot(d.to(k.dtype), k, input_precision=PRECISION)
                if shares is not None:
                    bias += by_offset(d, t, c, iy, ix, kernel, TY, TX, BN, RY, RX)
            else:
                mean += tl.sum(weights * d, 1)
    tl.store(delta + at, mean, mask=live)
    if d_query is not None:
        store_tokens(d_query, d_query_strides, image, z, head, y, x, live, 0, dim, scale * sums, BD)
    if shares is not None:
        store_offsets(shares, bias, kernel, RY, RX)


@triton.jit
def key_value_backward(
    d_key,  # [B, D, Hk, Wk, heads_k, dim]
    d_value,  # [B, D, Hk, Wk, heads_v, dim_v]
    grad,  # [B, D, H, W, heads, dim_v]
    delta,  # [B, D, H, W, heads] float32, of `query_backward`
    lse,  # [B, D, H, W, heads] float32
    query,  # [B, D, H, W, heads, dim]
    key,  # [B, D, Hk, Wk, heads_k, dim]
    value,  # [B, D, Hk, Wk, heads_v, dim_v]
    rpb,  # [heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1] float32; or None
    d_key_strides, d_value_strides, grad_strides, query_strides, key_strides, value_strides,
    size, queries, ratio, heads, share, dim, dim_v, scale, kernel, dilation, stride, grad_scale,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, PRECISION: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """d_key and d_value of a tile of keys, by the GROUP heads that share them, one after another."""
    image, z, group, ry, rx, ny, nx, iy, ix = tile(size, (1, 1, 1), heads // GROUP, dilation, TY, TX)
    live, y, x = (iy < ny) & (ix < nx), ry + iy * dilation[1], rx + ix * dilation[2]
    first = tl.program_id(1) * BV
    row, rows_end = queries_of_keys(masked_min(iy, live), masked_max(iy, live), ny, kernel[1], stride[1], CAUSAL_Y)
    column, columns_end = queries_of_keys(
        masked_min(ix, live), masked_max(ix, live), nx, kernel[2], stride[2], CAUSAL_X
    )
    residue, iz = z % dilation[0], z // dilation[0]
    nz = tl.cdiv(size[0] - residue, dilation[0])
    plane, planes_end = queries_of_keys(iz, iz, nz, kernel[0], stride[0], CAUSAL_Z)
    rows = tl.maximum(rows_end - row, 0) * ratio[1]
    d_k, d_v = tl.zeros([TY * TX, BD], tl.float32), tl.zeros([TY * TX, BV], tl.float32)
    for h in range(GROUP):
        head = group * GROUP + h
        head_k, head_v = head // share[0], head // share[1]
        k = load_tokens(key, key_strides, image, z, head_k, y, x, live, 0, dim, BD)
        if NV == 1:
            v = load_tokens(value, value_strides, image, z, head_v, y, x, live, 0, dim_v, BV)
        for n in range((planes_end - plane) * rows):
            i, from_iz = row * ratio[1] + n % rows, plane + n // rows
            from_z = residue + from_iz * dilation[0]
            at_y, from_row, row_exists = pixel_of(i, ry, ny, queries[1], ratio[1], dilation[1])
            y_start, y_end = window(at_y, ny, kernel[1], stride[1], CAUSAL_Y)
            for c in range(column * ratio[2], columns_end * ratio[2], BN):
                at_x, from_x, exists = pixel_of(c + tl.arange(0, BN), rx, nx, queries[2], ratio[2], dilation[2])
                exists &= row_exists
                x_start, x_end = window(at_x, nx, kernel[2], stride[2], CAUSAL_X)
                seen = ((iy >= y_start) & (iy < y_end))[:, None] & exists[None, :]
                seen &= (ix[:, None] >= x_start[None, :]) & (ix[:, None] < x_end[None, :])
                from_y = from_row + 0 * from_x
                at = (((image * queries[0] + from_z) * queries[1] + from_y) * queries[2] + from_x) * heads + head
                shift, mean = tl.load(lse + at, mask=exists, other=0.0), tl.load(delta + at, mask=exists, other=0.0)
                q = load_tokens(query, query_strides, image, from_z, head, from_y, from_x, exists, 0, dim, BD)
                g = load_tokens(grad, grad_strides, image, from_z, head, from_y, from_x, exists, first, dim_v, BV)
                steps_y, steps_x = (iy - at_y)[:, None], ix[:, None] - at_x[None, :]
                s = scores(k, q, rpb, head, iz - from_iz, steps_y, steps_x, seen, scale, kernel, PRECISION)
                weights = tl.exp(s - shift[None, :])
                if NV == 1:
                    d = tl.dot(v, tl.trans(g), input_precision=PRECISION)
                else:
                    d = value_products(
                        value, value_strides, z, y, x, live, head_v,
                        grad, grad_strides, from_z, from_y, from_x, exists, head,
                        image, dim_v, PRECISION, TY * TX, BN, BV, NV,
                    )  # fmt: skip
                d = tl.where(seen, grad_scale * d, 0.0)
                d_v += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
                d_k += tl.dot((weights * (d - mean[None, :])).to(q.dtype), q, input_precision=PRECISION)
        # The last head of a key or a value stores the sums.
        last_k, last_v = head % share[0] == share[0] - 1, head % share[1] == share[1] - 1
        store_tokens(d_key, d_key_strides, image, z, head_k, y, x, live & last_k, 0, dim, scale * d_k, BD)
        store_tokens(
            d_value, d_value_strides, image, z, head_v, y, x, live & last_v, first, dim_v, grad_scale * d_v, BV
        )
        d_k, d_v = tl.where(last_k, 0.0, d_k), tl.where(last_v, 0.0, d_v)


@triton.jit
def bias_backward(
    d_rpb,  # [parts, heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1] float32
    grad,  # [B, D, H, W, heads, dim_v]
    delta,  # [B, D, H, W, heads] float32, of `query_backward`
    lse,  # [B, D, H, W, heads] float32
    query,  # [B, D, H, W, heads, dim]
    key,  # [B, D, Hk, Wk, heads_k, dim]
    value,  # [B, D, Hk, Wk, heads_v, dim_v]
    rpb,  # [heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1] float32; or None
    grad_strides, query_strides, key_strides, value_strides,
    size, queries, ratio, heads, share, dim, dim_v, scale, kernel, dilation, stride, grad_scale, count,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    QUERIES: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
):  # fmt: skip
    """The contribution to d_rpb of one part, QUERIES of the `count` queries of all images, to one head and offset."""
    program = tl.program_id(0)
    steps_x, rest = program % (2 * kernel[2] - 1) - kernel[2] + 1, program // (2 * kernel[2] - 1)
    steps_y, rest = rest % (2 * kernel[1] - 1) - kernel[1] + 1, rest // (2 * kernel[1] - 1)
    steps_z, rest = rest % (2 * kernel[0] - 1) - kernel[0] + 1, rest // (2 * kernel[0] - 1)
    head, part = rest % heads, rest // heads
    bias = tl.load(rpb + program - part * heads * (2 * kernel[0] - 1) * (2 * kernel[1] - 1) * (2 * kernel[2] - 1))
    total = tl.zeros([BP], tl.float32)
    begin = part.to(tl.int64) * QUERIES
    for first in range(begin, tl.minimum(begin + QUERIES, count), BP):
        pixel = first + tl.arange(0, BP)
        x, line = pixel % queries[2], pixel // queries[2]
        y, plane = line % queries[1], line // queries[1]
        z, image = plane % queries[0], plane // queries[0]
        at_y, at_x = y // ratio[1], x // ratio[2]
        iy, ix = at_y // dilation[1], at_x // dilation[2]
        y_start, y_end = window(iy, tl.cdiv(size[1] - at_y % dilation[1], dilation[1]), kernel[1], stride[1], CAUSAL_Y)
        x_start, x_end = window(ix, tl.cdiv(size[2] - at_x % dilation[2], dilation[2]), kernel[2], stride[2], CAUSAL_X)
        z_start, z_end = planes_of(z, size, kernel, dilation, stride, CAUSAL_Z)
        tz, ty, tx = z // dilation[0] + steps_z, iy + steps_y, ix + steps_x
        seen = (pixel < count) & (tz >= z_start) & (tz < z_end)
        seen &= (ty >= y_start) & (ty < y_end) & (tx >= x_start) & (tx < x_end)
        planes, to_planes = z[:, None], (z + steps_z * dilation[0])[:, None]
        to_y, to_x = at_y + steps_y * dilation[1], at_x + steps_x * dilation[2]
        images = image[:, None]
        q = load_tokens(query, query_strides, images, planes, head, y, x, seen, 0, dim, BD).to(tl.float32)
        k = load_tokens(key, key_strides, images, to_planes, head // share[0], to_y, to_x, seen, 0, dim, BD).to(
            tl.float32
        )
        d = tl.zeros([BP], tl.float32)
        for block in range(NV):
            at = block * BV
            g = load_tokens(grad, grad_strides, images, planes, head, y, x, seen, at, dim_v, BV).to(tl.float32)
            v = load_tokens(value, value_strides, images, to_planes, head // share[1], to_y, to_x, seen, at, dim_v, BV)
            d += tl.sum(g * v.to(tl.float32), 1)
        at = pixel * heads + head
        shift, mean = tl.load(lse + at, mask=seen, other=0.0), tl.load(delta + at, mask=seen, other=0.0)
        weights = tl.exp(scale * tl.sum(q * k, 1) + bias - shift)
        total += tl.where(seen, weights * (grad_scale * d - mean), 0.0)
    tl.store(d_rpb + program, tl.sum(total))
