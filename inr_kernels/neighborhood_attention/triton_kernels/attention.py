"""The forward kernels of neighborhood_attention."""

import triton
import triton.language as tl

from .tiles import load_tokens, masked_max, masked_min, pixel_of, scores, store_tokens, tile, window


@triton.jit
def attend(
    out,  # [B, H, W, heads, dim_v]; or None: only lse
    lse,  # [B, H, W, heads] float32
    query,  # [B, H, W, heads, dim]
    key,  # [B, Hk, Wk, heads_k, dim]
    value,  # [B, Hk, Wk, heads_v, dim_v]
    rpb,  # [heads, 2 Kh - 1, 2 Kw - 1] float32; or None
    out_strides, query_strides, key_strides, value_strides,
    size, queries, ratio, heads, share, dim, dim_v, scale, kernel, dilation, stride,
    CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, PRECISION: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The attention of a tile of queries, and the log of the sum of exponentials of its scores."""
    image, head, ry, rx, ny, nx, cy, cx = tile(size, ratio, heads, dilation, TY, TX)
    iy, y, live = pixel_of(cy, ry, ny, queries[0], ratio[0], dilation[0])
    ix, x, live_x = pixel_of(cx, rx, nx, queries[1], ratio[1], dilation[1])
    live &= live_x
    first = tl.program_id(1) * BV
    q = load_tokens(query, query_strides, image, head, y, x, live, 0, dim, BD)
    y_start, y_end = window(iy, ny, kernel[0], stride[0], CAUSAL_Y)
    x_start, x_end = window(ix, nx, kernel[1], stride[1], CAUSAL_X)
    y_end = tl.where(live, y_end, y_start)
    max_logit = tl.full([TY * TX], float("-inf"), tl.float32)
    total = tl.zeros([TY * TX], tl.float32)
    sums = tl.zeros([TY * TX, BV], tl.float32)
    for t in range(masked_min(y_start, live), masked_max(y_end, live)):
        for c in range(masked_min(x_start, live), masked_max(x_end, live), BN):
            columns = c + tl.arange(0, BN)
            seen = ((t >= y_start) & (t < y_end))[:, None]
            seen &= (columns[None, :] >= x_start[:, None]) & (columns[None, :] < x_end[:, None])
            exists, to_y, to_x = columns < nx, ry + t * dilation[0] + 0 * columns, rx + columns * dilation[1]
            k = load_tokens(key, key_strides, image, head // share[0], to_y, to_x, exists, 0, dim, BD)
            steps_y, steps_x = (t - iy)[:, None], columns[None, :] - ix[:, None]
            s = scores(q, k, rpb, head, steps_y, steps_x, seen, scale, kernel, PRECISION)
            new_max = tl.maximum(max_logit, tl.max(s, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            rescale, weights = tl.exp(max_logit - shift), tl.exp(s - shift[:, None])
            total = total * rescale + tl.sum(weights, 1)
            max_logit = new_max
            if out is not None:
                v = load_tokens(value, value_strides, image, head // share[1], to_y, to_x, exists, first, dim_v, BV)
                sums = sums * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    if out is not None:
        store_tokens(out, out_strides, image, head, y, x, live, first, dim_v, sums / total[:, None], BV)
    at = ((image * queries[0] + y) * queries[1] + x) * heads + head
    tl.store(lse + at, max_logit + tl.log(total), mask=live)


@triton.jit
def attend_mean(
    out,  # [B, H, W, 1, dim_v]
    lse,  # [B, H, W, heads] float32, of `attend`
    query,  # [B, H, W, heads, dim]
    key,  # [B, Hk, Wk, heads_k, dim]
    value,  # [B, Hk, Wk, 1, dim_v]
    rpb,  # [heads, 2 Kh - 1, 2 Kw - 1] float32; or None
    out_strides, query_strides, key_strides, value_strides,
    size, queries, ratio, heads, share, dim, dim_v, scale, kernel, dilation, stride,
    CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, PRECISION: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The mean over the heads of the attention of a tile of queries to values that all heads share."""
    image, head, ry, rx, ny, nx, cy, cx = tile(size, ratio, 1, dilation, TY, TX)
    iy, y, live = pixel_of(cy, ry, ny, queries[0], ratio[0], dilation[0])
    ix, x, live_x = pixel_of(cx, rx, nx, queries[1], ratio[1], dilation[1])
    live &= live_x
    first = tl.program_id(1) * BV
    at = ((image * queries[0] + y) * queries[1] + x) * heads
    y_start, y_end = window(iy, ny, kernel[0], stride[0], CAUSAL_Y)
    x_start, x_end = window(ix, nx, kernel[1], stride[1], CAUSAL_X)
    y_end = tl.where(live, y_end, y_start)
    sums = tl.zeros([TY * TX, BV], tl.float32)
    for t in range(masked_min(y_start, live), masked_max(y_end, live)):
        for c in range(masked_min(x_start, live), masked_max(x_end, live), BN):
            columns = c + tl.arange(0, BN)
            seen = ((t >= y_start) & (t < y_end))[:, None]
            seen &= (columns[None, :] >= x_start[:, None]) & (columns[None, :] < x_end[:, None])
            exists, to_y, to_x = columns < nx, ry + t * dilation[0] + 0 * columns, rx + columns * dilation[1]
            steps_y, steps_x = (t - iy)[:, None], columns[None, :] - ix[:, None]
            weights = tl.zeros([TY * TX, BN], tl.float32)
            for h in range(heads):
                one = head + h
                q = load_tokens(query, query_strides, image, one, y, x, live, 0, dim, BD)
                k = load_tokens(key, key_strides, image, one // share[0], to_y, to_x, exists, 0, dim, BD)
                s = scores(q, k, rpb, one, steps_y, steps_x, seen, scale, kernel, PRECISION)
                weights += tl.exp(s - tl.load(lse + at + h, mask=live, other=0.0)[:, None])
            v = load_tokens(value, value_strides, image, head, to_y, to_x, exists, first, dim_v, BV)
            sums += tl.dot((weights / heads).to(v.dtype), v, input_precision=PRECISION)
    store_tokens(out, out_strides, image, head, y, x, live, first, dim_v, sums, BV)
