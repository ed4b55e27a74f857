"""What the Triton kernels of neighborhood_attention share: the window rule, tiles of pixels, tokens, scores."""

import triton
import triton.language as tl


@triton.jit
def window(i, n, kernel, stride, CAUSAL: tl.constexpr):
    """NATTEN's rule: the keys [start, end) of the query at position i in its residue class of n pixels."""
    group = i // stride * stride
    if CAUSAL:
        start = tl.maximum(tl.minimum(group + stride - 1, n - 1) - kernel + 1, 0)
        end = i + 1
    else:
        lead = tl.minimum(group + stride // 2, n - 1)
        start = tl.minimum(tl.maximum(lead - kernel // 2, 0), n - kernel)
        end = start + kernel
    return start, end


@triton.jit
def queries_of_keys(first, last, n, kernel, stride, CAUSAL: tl.constexpr):
    """The queries [begin, end) whose windows contain any of the keys first ... last."""
    begin, end = first, last + 1
    while (begin > 0) & (window(begin - 1, n, kernel, stride, CAUSAL)[1] > first):
        begin -= 1
    while (end < n) & (window(end, n, kernel, stride, CAUSAL)[0] <= last):
        end += 1
    return begin, end


@triton.jit
def tile(size, ratio, heads, dilation, TY: tl.constexpr, TX: tl.constexpr):
    """The program's image, plane and head; per axis residue, class size and positions [TY TX] times the ratio.

    size: of the keys, (depth, height, width) as in all such tuples. ratio: of the queries' size to it, or ones for a
    tile of keys.
    """
    program = tl.program_id(0)
    head, rest = program % heads, program // heads
    tiles_y = tl.cdiv(tl.cdiv(size[1], dilation[1]) * ratio[1], TY)
    tiles_x = tl.cdiv(tl.cdiv(size[2], dilation[2]) * ratio[2], TX)
    m = tl.arange(0, TY * TX)
    ix, rest = rest % tiles_x * TX + m % TX, rest // tiles_x
    rx, rest = rest % dilation[2], rest // dilation[2]
    iy, rest = rest % tiles_y * TY + m // TX, rest // tiles_y
    ry, rest = rest % dilation[1], rest // dilation[1]
    z, image = rest % size[0], rest // size[0]
    ny, nx = tl.cdiv(size[1] - ry, dilation[1]), tl.cdiv(size[2] - rx, dilation[2])
    return image.to(tl.int64), z.to(tl.int64), head, ry, rx, ny, nx, iy, ix


@triton.jit
def planes_of(z, size, kernel, dilation, stride, CAUSAL_Z: tl.constexpr):
    """The planes [start, end) of keys that the queries of plane z see, as positions in its residue class."""
    n = tl.cdiv(size[0] - z % dilation[0], dilation[0])
    return window(z // dilation[0], n, kernel[0], stride[0], CAUSAL_Z)


@triton.jit
def pixel_of(i, residue, n, queries, ratio, dilation):
    """The position of a query in its residue class of n keys, its coordinate, and whether there is such a query."""
    position = i // ratio
    at = (residue + position * dilation) * ratio + i % ratio
    return position, at, (position < n) & (at < queries)


@triton.jit
def masked_min(values, mask):
    """The smallest of the values under the mask."""
    return tl.min(tl.where(mask, values, 1 << 30))


@triton.jit
def masked_max(values, mask):
    """The largest of the values under the mask."""
    return tl.max(tl.where(mask, values, -1))


@triton.jit
def addresses(
    tokens,  # [B, D, H, W, heads, dim]: by strides, the last is 1
    strides, image, z, head, y, x, first, BD: tl.constexpr,
):  # fmt: skip
    """The addresses [N, BD] of the channels, from `first` on, of the tokens of plane z at y, x ([N] or scalars)."""
    at = tokens + image * strides[0] + z * strides[1] + head.to(tl.int64) * strides[4] + first
    pixels = y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return at + pixels[:, None] + tl.arange(0, BD)[None, :]


@triton.jit
def load_tokens(
    tokens,  # [B, D, H, W, heads, dim]: by strides, the last is 1
    strides, image, z, head, y, x, mask, first, dim, BD: tl.constexpr,
):  # fmt: skip
    """The tokens at y, x: [N, BD], from channel `first` of `dim` on, zeros outside the mask."""
    inside = mask[:, None] & (first + tl.arange(0, BD) < dim)[None, :]
    return tl.load(addresses(tokens, strides, image, z, head, y, x, first, BD), mask=inside, other=0.0)


@triton.jit
def store_tokens(
    tokens,  # [B, D, H, W, heads, dim]: by strides, the last is 1
    strides, image, z, head, y, x, mask, first, dim, values, BD: tl.constexpr,
):  # fmt: skip
    """Stores values [N, BD] in the tensor's dtype, as the channels from `first` of `dim` on."""
    inside = mask[:, None] & (first + tl.arange(0, BD) < dim)[None, :]
    at = addresses(tokens, strides, image, z, head, y, x, first, BD)
    tl.store(at, values.to(tokens.dtype.element_ty), mask=inside)


@triton.jit
def scores(
    query, keys,
    rpb,  # [heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1] float32; or None
    head, steps_z, steps_y, steps_x, seen, scale, kernel, PRECISION: tl.constexpr,
):  # fmt: skip
    """query [M, BD], keys [N, BD] -> [M, N], -inf outside the windows (`seen`).

    steps_z, steps_y, steps_x: from query to key, in units of the dilation.
    """
    s = scale * tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if rpb is not None:
        row = (head * (2 * kernel[0] - 1) + steps_z + kernel[0] - 1) * (2 * kernel[1] - 1)
        row = (row + steps_y + kernel[1] - 1) * (2 * kernel[2] - 1)
        s += tl.load(rpb + row + steps_x + kernel[2] - 1, mask=seen, other=0.0)
    return tl.where(seen, s, float("-inf"))
