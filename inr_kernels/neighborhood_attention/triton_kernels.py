"""The Triton backend of neighborhood_attention: kernels, launches and block sizes.

A program takes a tile of TY x TX pixels of one residue class (pixels whose positions are equal modulo the dilation), of
one head of one image: queries, or in `key_value_backward` keys. It loops once over the rows of the other side that the
tile's windows cover, BN columns at a time; the forward has an online softmax. No kernel uses atomics: keys gather from
the queries whose windows contain them. All tensors of tokens are read by strides; the last stride is 1.

A NaN or an infinity spreads to every pixel of the tiles that load it, not only to the windows that contain it.

Tested in Triton's interpreter and compiled ahead of time (tests/build/test_compile_only.py); not run on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from inr_kernels._core import backends

TY, TX, BN = 4, 8, 16
# Of a program of `bias_backward`: queries in all, queries x channels at a time.
QUERIES, CHANNELS = 4096, 4096

why_not = backends.why_not_dot


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
def tile(size, heads, dilation, TY: tl.constexpr, TX: tl.constexpr):
    """The program's image and head; per axis residue, class size and positions [TY TX]; the mask of valid ones."""
    program = tl.program_id(0)
    head, rest = program % heads, program // heads
    tiles_y = tl.cdiv(tl.cdiv(size[0], dilation[0]), TY)
    tiles_x = tl.cdiv(tl.cdiv(size[1], dilation[1]), TX)
    m = tl.arange(0, TY * TX)
    ix, rest = rest % tiles_x * TX + m % TX, rest // tiles_x
    rx, rest = rest % dilation[1], rest // dilation[1]
    iy, rest = rest % tiles_y * TY + m // TX, rest // tiles_y
    ry, image = rest % dilation[0], rest // dilation[0]
    ny, nx = tl.cdiv(size[0] - ry, dilation[0]), tl.cdiv(size[1] - rx, dilation[1])
    return image.to(tl.int64), head, ry, rx, ny, nx, iy, ix, (iy < ny) & (ix < nx)


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
    tokens,  # [B, H, W, heads, dim]: by strides, the last is 1
    strides, image, head, y, x, BD: tl.constexpr,
):  # fmt: skip
    """The addresses [N, BD] of the channels of the tokens at y, x ([N] or scalars)."""
    at = tokens + image * strides[0] + head.to(tl.int64) * strides[3]
    pixels = y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]
    return at + pixels[:, None] + tl.arange(0, BD)[None, :]


@triton.jit
def load_tokens(
    tokens,  # [B, H, W, heads, dim]: by strides, the last is 1
    strides, image, head, y, x, mask, dim, BD: tl.constexpr,
):  # fmt: skip
    """The tokens at y, x: [N, BD], zeros outside the mask."""
    inside = mask[:, None] & (tl.arange(0, BD) < dim)[None, :]
    return tl.load(addresses(tokens, strides, image, head, y, x, BD), mask=inside, other=0.0)


@triton.jit
def store_tokens(
    tokens,  # [B, H, W, heads, dim]: by strides, the last is 1
    strides, image, head, y, x, mask, dim, values, BD: tl.constexpr,
):  # fmt: skip
    """Stores values [N, BD] in the tensor's dtype."""
    inside = mask[:, None] & (tl.arange(0, BD) < dim)[None, :]
    at = addresses(tokens, strides, image, head, y, x, BD)
    tl.store(at, values.to(tokens.dtype.element_ty), mask=inside)


@triton.jit
def scores(
    query, keys,
    rpb,  # [heads, 2 Kh - 1, 2 Kw - 1] float32; or None
    head, steps_y, steps_x, seen, scale, kernel, PRECISION: tl.constexpr,
):  # fmt: skip
    """query [M, BD], keys [N, BD] -> [M, N], -inf outside the windows (`seen`).

    steps_y, steps_x: from query to key, in units of the dilation.
    """
    s = scale * tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if rpb is not None:
        row = (head * (2 * kernel[0] - 1) + steps_y + kernel[0] - 1) * (2 * kernel[1] - 1)
        s += tl.load(rpb + row + steps_x + kernel[1] - 1, mask=seen, other=0.0)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def attend(
    out,  # [B, H, W, heads, dim]
    lse,  # [B, H, W, heads] float32
    query, key, value,  # [B, H, W, heads, dim]
    rpb,  # [heads, 2 Kh - 1, 2 Kw - 1] float32; or None
    out_strides, query_strides, key_strides, value_strides,
    size, heads, dim, scale, kernel, dilation, stride, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    PRECISION: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The attention of a tile of queries, and the log of the sum of exponentials of its scores."""
    image, head, ry, rx, ny, nx, iy, ix, live = tile(size, heads, dilation, TY, TX)
    y, x = ry + iy * dilation[0], rx + ix * dilation[1]
    q = load_tokens(query, query_strides, image, head, y, x, live, dim, BD)
    y_start, y_end = window(iy, ny, kernel[0], stride[0], CAUSAL_Y)
    x_start, x_end = window(ix, nx, kernel[1], stride[1], CAUSAL_X)
    y_end = tl.where(live, y_end, y_start)
    max_logit = tl.full([TY * TX], float("-inf"), tl.float32)
    total = tl.zeros([TY * TX], tl.float32)
    sums = tl.zeros([TY * TX, BD], tl.float32)
    for t in range(masked_min(y_start, live), masked_max(y_end, live)):
        for c in range(masked_min(x_start, live), masked_max(x_end, live), BN):
            columns = c + tl.arange(0, BN)
            seen = ((t >= y_start) & (t < y_end))[:, None]
            seen &= (columns[None, :] >= x_start[:, None]) & (columns[None, :] < x_end[:, None])
            exists, to_y, to_x = columns < nx, ry + t * dilation[0] + 0 * columns, rx + columns * dilation[1]
            k = load_tokens(key, key_strides, image, head, to_y, to_x, exists, dim, BD)
            steps_y, steps_x = (t - iy)[:, None], columns[None, :] - ix[:, None]
            s = scores(q, k, rpb, head, steps_y, steps_x, seen, scale, kernel, PRECISION)
            new_max = tl.maximum(max_logit, tl.max(s, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            rescale, weights = tl.exp(max_logit - shift), tl.exp(s - shift[:, None])
            v = load_tokens(value, value_strides, image, head, to_y, to_x, exists, dim, BD)
            total = total * rescale + tl.sum(weights, 1)
            sums = sums * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            max_logit = new_max
    store_tokens(out, out_strides, image, head, y, x, live, dim, sums / total[:, None], BD)
    at = ((image * size[0] + y) * size[1] + x) * heads + head
    tl.store(lse + at, max_logit + tl.log(total), mask=live)


@triton.jit
def query_backward(
    d_query,  # [B, H, W, heads, dim]; or None
    delta,  # [B, H, W, heads] float32
    grad,  # [B, H, W, heads, dim]
    grad_lse,  # [B, H, W, heads] float32
    lse,  # [B, H, W, heads] float32
    query, key, value,  # [B, H, W, heads, dim]
    rpb,  # [heads, 2 Kh - 1, 2 Kw - 1] float32; or None
    d_query_strides, grad_strides, query_strides, key_strides, value_strides,
    size, heads, dim, scale, kernel, dilation, stride,
    CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, PRECISION: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """delta = sum of weights times their gradients - grad_lse, for a tile of queries; and d_query unless it is None."""
    image, head, ry, rx, ny, nx, iy, ix, live = tile(size, heads, dilation, TY, TX)
    y, x = ry + iy * dilation[0], rx + ix * dilation[1]
    at = ((image * size[0] + y) * size[1] + x) * heads + head
    q = load_tokens(query, query_strides, image, head, y, x, live, dim, BD)
    g = load_tokens(grad, grad_strides, image, head, y, x, live, dim, BD)
    shift, mean = tl.load(lse + at, mask=live, other=0.0), -tl.load(grad_lse + at, mask=live, other=0.0)
    y_start, y_end = window(iy, ny, kernel[0], stride[0], CAUSAL_Y)
    x_start, x_end = window(ix, nx, kernel[1], stride[1], CAUSAL_X)
    y_end = tl.where(live, y_end, y_start)
    rows, end = masked_min(y_start, live), masked_max(y_end, live)
    sums = tl.zeros([TY * TX, BD], tl.float32)
    for t in range(rows, end + (end - rows if d_query is not None else 0)):  # a pass for delta, a pass for d_query
        again = t >= end
        t -= tl.where(again, end - rows, 0)
        for c in range(masked_min(x_start, live), masked_max(x_end, live), BN):
            columns = c + tl.arange(0, BN)
            seen = ((t >= y_start) & (t < y_end))[:, None]
            seen &= (columns[None, :] >= x_start[:, None]) & (columns[None, :] < x_end[:, None])
            exists, to_y, to_x = columns < nx, ry + t * dilation[0] + 0 * columns, rx + columns * dilation[1]
            k = load_tokens(key, key_strides, image, head, to_y, to_x, exists, dim, BD)
            v = load_tokens(value, value_strides, image, head, to_y, to_x, exists, dim, BD)
            steps_y, steps_x = (t - iy)[:, None], columns[None, :] - ix[:, None]
            s = scores(q, k, rpb, head, steps_y, steps_x, seen, scale, kernel, PRECISION)
            weights = tl.exp(s - shift[:, None])
            d = tl.where(seen, tl.dot(g, tl.trans(v), input_precision=PRECISION), 0.0)
            if again:
                sums += tl.dot((weights * (d - mean[:, None])).to(k.dtype), k, input_precision=PRECISION)
            else:
                mean += tl.sum(weights * d, 1)
    tl.store(delta + at, mean, mask=live)
    if d_query is not None:
        store_tokens(d_query, d_query_strides, image, head, y, x, live, dim, scale * sums, BD)


@triton.jit
def key_value_backward(
    d_key, d_value,  # [B, H, W, heads, dim]
    grad,  # [B, H, W, heads, dim]
    delta,  # [B, H, W, heads] float32, of `query_backward`
    lse,  # [B, H, W, heads] float32
    query, key, value,  # [B, H, W, heads, dim]
    rpb,  # [heads, 2 Kh - 1, 2 Kw - 1] float32; or None
    d_key_strides, d_value_strides, grad_strides, query_strides, key_strides, value_strides,
    size, heads, dim, scale, kernel, dilation, stride,
    CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr, PRECISION: tl.constexpr,
    TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """d_key and d_value of a tile of keys."""
    image, head, ry, rx, ny, nx, iy, ix, live = tile(size, heads, dilation, TY, TX)
    y, x = ry + iy * dilation[0], rx + ix * dilation[1]
    k = load_tokens(key, key_strides, image, head, y, x, live, dim, BD)
    v = load_tokens(value, value_strides, image, head, y, x, live, dim, BD)
    d_k, d_v = tl.zeros([TY * TX, BD], tl.float32), tl.zeros([TY * TX, BD], tl.float32)
    row, rows_end = queries_of_keys(masked_min(iy, live), masked_max(iy, live), ny, kernel[0], stride[0], CAUSAL_Y)
    column, columns_end = queries_of_keys(
        masked_min(ix, live), masked_max(ix, live), nx, kernel[1], stride[1], CAUSAL_X
    )
    for i in range(row, rows_end):
        y_start, y_end = window(i, ny, kernel[0], stride[0], CAUSAL_Y)
        for c in range(column, columns_end, BN):
            columns = c + tl.arange(0, BN)
            x_start, x_end = window(columns, nx, kernel[1], stride[1], CAUSAL_X)
            exists = columns < nx
            seen = ((iy >= y_start) & (iy < y_end))[:, None] & exists[None, :]
            seen &= (ix[:, None] >= x_start[None, :]) & (ix[:, None] < x_end[None, :])
            from_y, from_x = ry + i * dilation[0] + 0 * columns, rx + columns * dilation[1]
            at = ((image * size[0] + from_y) * size[1] + from_x) * heads + head
            shift, mean = tl.load(lse + at, mask=exists, other=0.0), tl.load(delta + at, mask=exists, other=0.0)
            q = load_tokens(query, query_strides, image, head, from_y, from_x, exists, dim, BD)
            g = load_tokens(grad, grad_strides, image, head, from_y, from_x, exists, dim, BD)
            steps_y, steps_x = (iy - i)[:, None], ix[:, None] - columns[None, :]
            s = scores(k, q, rpb, head, steps_y, steps_x, seen, scale, kernel, PRECISION)
            weights = tl.exp(s - shift[None, :])
            d = tl.where(seen, tl.dot(v, tl.trans(g), input_precision=PRECISION), 0.0)
            d_v += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
            d_k += tl.dot((weights * (d - mean[None, :])).to(q.dtype), q, input_precision=PRECISION)
    store_tokens(d_key, d_key_strides, image, head, y, x, live, dim, scale * d_k, BD)
    store_tokens(d_value, d_value_strides, image, head, y, x, live, dim, d_v, BD)


@triton.jit
def bias_backward(
    d_rpb,  # [parts, heads, 2 Kh - 1, 2 Kw - 1] float32
    grad,  # [B, H, W, heads, dim]
    delta,  # [B, H, W, heads] float32, of `query_backward`
    lse,  # [B, H, W, heads] float32
    query, key, value,  # [B, H, W, heads, dim]
    rpb,  # [heads, 2 Kh - 1, 2 Kw - 1] float32; or None
    grad_strides, query_strides, key_strides, value_strides,
    size, heads, dim, scale, kernel, dilation, stride, count, CAUSAL_Y: tl.constexpr, CAUSAL_X: tl.constexpr,
    QUERIES: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The contribution to d_rpb of one part, QUERIES of the `count` queries of all images, to one head and offset."""
    program = tl.program_id(0)
    steps_x, rest = program % (2 * kernel[1] - 1) - kernel[1] + 1, program // (2 * kernel[1] - 1)
    steps_y, rest = rest % (2 * kernel[0] - 1) - kernel[0] + 1, rest // (2 * kernel[0] - 1)
    head, part = rest % heads, rest // heads
    bias = tl.load(rpb + program - part * heads * (2 * kernel[0] - 1) * (2 * kernel[1] - 1))
    total = tl.zeros([BP], tl.float32)
    begin = part.to(tl.int64) * QUERIES
    for first in range(begin, tl.minimum(begin + QUERIES, count), BP):
        pixel = first + tl.arange(0, BP)
        x, y, image = pixel % size[1], pixel // size[1] % size[0], pixel // size[1] // size[0]
        iy, ix = y // dilation[0], x // dilation[1]
        y_start, y_end = window(iy, tl.cdiv(size[0] - y % dilation[0], dilation[0]), kernel[0], stride[0], CAUSAL_Y)
        x_start, x_end = window(ix, tl.cdiv(size[1] - x % dilation[1], dilation[1]), kernel[1], stride[1], CAUSAL_X)
        ty, tx = iy + steps_y, ix + steps_x
        seen = (pixel < count) & (ty >= y_start) & (ty < y_end) & (tx >= x_start) & (tx < x_end)
        to_y, to_x = y + steps_y * dilation[0], x + steps_x * dilation[1]
        q = load_tokens(query, query_strides, image[:, None], head, y, x, seen, dim, BD).to(tl.float32)
        k = load_tokens(key, key_strides, image[:, None], head, to_y, to_x, seen, dim, BD).to(tl.float32)
        g = load_tokens(grad, grad_strides, image[:, None], head, y, x, seen, dim, BD).to(tl.float32)
        v = load_tokens(value, value_strides, image[:, None], head, to_y, to_x, seen, dim, BD).to(tl.float32)
        at = pixel * heads + head
        shift, mean = tl.load(lse + at, mask=seen, other=0.0), tl.load(delta + at, mask=seen, other=0.0)
        weights = tl.exp(scale * tl.sum(q * k, 1) + bias - shift)
        total += tl.where(seen, weights * (tl.sum(g * v, 1) - mean), 0.0)
    tl.store(d_rpb + program, tl.sum(total))


class _Problem:
    """A call's tensors, and the arguments of its launches."""

    def __init__(self, qkv, rpb, kernel_size, dilation, stride, is_causal, scale):
        tensors = qkv[0].unbind(3) if len(qkv) == 1 else qkv
        self.tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
        self.query, self.rpb = self.tensors[0], None if rpb is None else rpb.contiguous()
        batch, *self.size, self.heads, self.dim = self.query.shape
        classes = [(triton.cdiv(n, d), d) for n, d in zip(self.size, dilation, strict=True)]
        (rows, dy), (columns, dx) = classes
        block = max(16, triton.next_power_of_2(self.dim))
        height = TY if block * self.query.element_size() <= 256 else TY // 2  # more would spill registers
        self.grid = (batch * dy * triton.cdiv(rows, height) * dx * triton.cdiv(columns, TX) * self.heads,)
        self.window = tuple(kernel_size), tuple(dilation), tuple(stride)
        self.shape = tuple(self.size), self.heads, self.dim, scale, *self.window
        self.taps = [2 * k - 1 for k in kernel_size]
        self.forms = {"CAUSAL_Y": bool(is_causal[0]), "CAUSAL_X": bool(is_causal[1]), "BD": block}
        self.tiles = self.forms | {"PRECISION": backends.precision(), "TY": height, "TX": TX, "BN": BN}
        # Without a limit ptxas would spill registers in order to fit more programs.
        self.tiles |= {"num_warps": 4 if block <= 64 else 8, "num_stages": 1, "maxnreg": 255}

    def forward(self, out, lse):
        tensors = out, *self.tensors
        attend[self.grid](out, lse, *self.tensors, self.rpb, *map(_strides, tensors), *self.shape, **self.tiles)

    def backward(self, grad, grad_lse, lse, d_query, d_key, d_value, needs_rpb):
        """Writes the gradients that are not None; returns d_rpb or None."""
        delta = torch.empty_like(lse)
        given = grad, *self.tensors
        query_backward[self.grid](
            d_query, delta, grad, grad_lse, lse, *self.tensors, self.rpb,
            *map(_strides, (grad if d_query is None else d_query, *given)), *self.shape, **self.tiles,
        )  # fmt: skip
        if d_key is not None:
            key_value_backward[self.grid](
                d_key, d_value, grad, delta, lse, *self.tensors, self.rpb,
                *map(_strides, (d_key, d_value, *given)), *self.shape, **self.tiles,
            )  # fmt: skip
        if not needs_rpb:
            return None
        count = lse.numel() // self.heads
        shares = lse.new_empty(triton.cdiv(count, QUERIES), self.heads, *self.taps)
        bias_backward[(shares.numel(),)](
            shares, grad, delta, lse, *self.tensors, self.rpb, *map(_strides, given), *self.shape, count,
            QUERIES=QUERIES, BP=max(1, CHANNELS // self.forms["BD"]), **self.forms,
        )  # fmt: skip
        return shares.sum(0)


def _strides(tokens):
    return tokens.stride()[:4]


def forward(qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the op's arguments (op.py), returns out [B, H, W, heads, dim] and lse [B, H, W, heads]."""
    p = _Problem(qkv, rpb, *rest)
    out = p.query.new_empty(p.query.shape)
    lse = p.query.new_empty(p.query.shape[:-1], dtype=torch.float32)
    if out.numel():
        with backends.on(out.device):
            p.forward(out, lse)
    return out, lse


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    lse: torch.Tensor,
    qkv: Sequence[torch.Tensor],
    rpb: torch.Tensor | None,
    *rest: Any,
    needs: Sequence[bool],
) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
    """The gradients of qkv (a list, None where not needed) and of rpb (or None)."""
    p = _Problem(qkv, rpb, *rest)
    *needs_qkv, needs_rpb = needs
    grads: list[Any] = [t.new_empty(t.shape) if needed else None for t, needed in zip(qkv, needs_qkv, strict=True)]
    if not grad.numel():
        return grads, None if rpb is None or not needs_rpb else torch.zeros_like(rpb)
    d_query, d_key, d_value = grads[0].unbind(3) if len(qkv) == 1 and needs_qkv[0] else grads * (3 // len(qkv))
    if (d_key is None) != (d_value is None):  # the kernel writes both
        d_key = p.query.new_empty(p.query.shape) if d_key is None else d_key
        d_value = p.query.new_empty(p.query.shape) if d_value is None else d_value
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    with backends.on(grad.device):
        d_rpb = p.backward(grad, grad_lse.contiguous(), lse.contiguous(), d_query, d_key, d_value, needs_rpb)
    return grads, d_rpb
