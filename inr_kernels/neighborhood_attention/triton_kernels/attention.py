"""The forward kernels of neighborhood_attention."""

import triton
import triton.language as tl

from .tiles import load_tokens, masked_max, masked_min, pixel_of, planes_of, scores, store_tokens, tile, window


@triton.jit
def attend(
    out,  # [B, D, H, W, heads, dim_v]; or None: only lse
    lse,  # [B, D, H, W, heads] float32
    query,  # [B, D, H, W, heads, dim]
    key,  # [B, D, Hk, Wk, heads_k, dim]
    value,  # [B, D, Hk, Wk, heads_v, dim_v]
    rpb,  # [heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1] float32; or None
    out_strides, query_strides, key_strides, value_strides,
    size, queries, ratio, heads, share, dim, dim_v, scale, kernel, dilation, stride,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, PRECISION: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The attention of a tile of queries, and the log of the sum of exponentials of its scores."""
    image, z, head, ry, rx, ny, nx, cy, cx = tile(size, ratio, heads, dilation, TY, TX)
    iy, y, live = pixel_of(cy, ry, ny, queries[1], ratio[1], dilation[1])
    ix, x, live_x = pixel_of(cx, rx, nx, queries[2], ratio[2], dilation[2])
    live &= live_x
    first = tl.program_id(1) * BV
    q = load_tokens(query, query_strides, image, z, head, y, x, live, 0, dim, BD)
    y_start, y_end = window(iy, ny, kernel[1], stride[1], CAUSAL_Y)
    x_start, x_end = window(ix, nx, kernel[2], stride[2], CAUSAL_X)
    y_end = tl.where(live, y_end, y_start)
    max_logit = tl.full([TY * TX], float("-inf"), tl.float32)
    total = tl.zeros([TY * TX], tl.float32)
    sums = tl.zeros([TY * TX, BV], tl.float32)
    z_start, z_end = planes_of(z, size, kernel, dilation, stride, CAUSAL_Z)
    rows = masked_min(y_start, live)
    height = tl.maximum(masked_max(y_end, live) - rows, 0)
    for n in range((z_end - z_start) * height):
        t, step = rows + n % height, z_start + n // height - z // dilation[0]
        to_z = z + step * dilation[0]
        for c in range(masked_min(x_start, live), masked_max(x_end, live), BN):
            columns = c + tl.arange(0, BN)
            seen = ((t >= y_start) & (t < y_end))[:, None]
            seen &= (columns[None, :] >= x_start[:, None]) & (columns[None, :] < x_end[:, None])
            exists, to_y, to_x = columns < nx, ry + t * dilation[1] + 0 * columns, rx + columns * dilation[2]
            k = load_tokens(key, key_strides, image, to_z, head // share[0], to_y, to_x, exists, 0, dim, BD)
            steps_y, steps_x = (t - iy)[:, None], columns[None, :] - ix[:, None]
            s = scores(q, k, rpb, head, step, steps_y, steps_x, seen, scale, kernel, PRECISION)
            new_max = tl.maximum(max_logit, tl.max(s, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            rescale, weights = tl.exp(max_logit - shift), tl.exp(s - shift[:, None])
            total = total * rescale + tl.sum(weights, 1)
            max_logit = new_max
            if out is not None:
                v = load_tokens(
                    value, value_strides, image, to_z, head // share[1], to_y, to_x, exists, first, dim_v, BV
                )
                sums = sums * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    if out is not None:
        store_tokens(out, out_strides, image, z, head, y, x, live, first, dim_v, sums / total[:, None], BV)
    at = (((image * queries[0] + z) * queries[1] + y) * queries[2] + x) * heads + head
    tl.store(lse + at, max_logit + tl.log(total), mask=live)


@triton.jit
def attend_mean(
    out,  # [B, D, H, W, 1, dim_v]
    lse,  # [B, D, H, W, heads] float32, of `attend`
    query,  # [B, D, H, W, heads, dim]
    key,  # [B, D, Hk, Wk, heads_k, dim]
    value,  # [B, D, Hk, Wk, 1, dim_v]
    rpb,  # [heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1] float32; or None
    out_strides, query_strides, key_strides, value_strides,
    size, queries, ratio, heads, share, dim, dim_v, scale, kernel, dilation, stride,
    CAUSAL_Z: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, PRECISION: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The mean over the heads of the attention of a tile of queries to values that all heads share."""
    image, z, head, ry, rx, ny, nx, cy, cx = tile(size, ratio, 1, dilation, TY, TX)
    iy, y, live = pixel_of(cy, ry, ny, queries[1], ratio[1], dilation[1])
    ix, x, live_x = pixel_of(cx, rx, nx, queries[2], ratio[2], dilation[2])
    live &= live_x
    first = tl.program_id(1) * BV
    at = (((image * queries[0] + z) * queries[1] + y) * queries[2] + x) * heads
    y_start, y_end = window(iy, ny, kernel[1], stride[1], CAUSAL_Y)
    x_start, x_end = window(ix, nx, kernel[2], stride[2], CAUSAL_X)
    y_end = tl.where(live, y_end, y_start)
    sums = tl.zeros([TY * TX, BV], tl.float32)
    z_start, z_end = planes_of(z, size, kernel, dilation, stride, CAUSAL_Z)
    rows = masked_min(y_start, live)
    height = tl.maximum(masked_max(y_end, live) - rows, 0)
    for n in range((z_end - z_start) * height):
        t, step = rows + n % height, z_start + n // height - z // dilation[0]
        to_z = z + step * dilation[0]
        for c in range(masked_min(x_start, live), masked_max(x_end, live), BN):
            columns = c + tl.arange(0, BN)
            seen = ((t >= y_start) & (t < y_end))[:, None]
            seen &= (columns[None, :] >= x_start[:, None]) & (columns[None, :] < x_end[:, None])
            exists, to_y, to_x = columns < nx, ry + t * dilation[1] + 0 * columns, rx + columns * dilation[2]
            steps_y, steps_x = (t - iy)[:, None], columns[None, :] - ix[:, None]
            weights = tl.zeros([TY * TX, BN], tl.float32)
            for h in range(heads):
                one = head + h
                q = load_tokens(query, query_strides, image, z, one, y, x, live, 0, dim, BD)
                k = load_tokens(key, key_strides, image, to_z, one // share[0], to_y, to_x, exists, 0, dim, BD)
                s = scores(q, k, rpb, one, step, steps_y, steps_x, seen, scale, kernel, PRECISION)
                weights += tl.exp(s - tl.load(lse + at + h, mask=live, other=0.0)[:, None])
            v = load_tokens(value, value_strides, image, to_z, head, to_y, to_x, exists, first, dim_v, BV)
            sums += tl.dot((weights / heads).to(v.dtype), v, input_precision=PRECISION)
    store_tokens(out, out_strides, image, z, head, y, x, live, first, dim_v, sums, BV)
