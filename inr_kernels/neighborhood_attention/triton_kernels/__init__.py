"""The Triton backend of neighborhood_attention: launches and block sizes.

A program takes a tile of TY x TX pixels of one residue class (pixels whose positions are equal modulo the dilation), of
one head of one plane of one image: queries, or in `key_value_backward` keys, with all heads that share them. It loops
once over the rows of the other side that the tile's windows cover, in all planes, BN columns at a time; the forward has
an online softmax. Values of more than WIDE channels are taken in blocks of BV, each by a program. No kernel uses
atomics: keys gather from the queries whose windows contain them. All tensors of tokens are read by strides; the last
stride is 1.

Tensors of one or two dimensions are volumes of one plane here.

In cross-scale attention a residue class is one of the keys, and the queries of a position of the keys are `ratio`
adjacent ones per axis: a position `i` of the class has the queries i * ratio ... (i + 1) * ratio - 1.

A NaN or an infinity spreads to every pixel of the tiles that load it, not only to the windows that contain it.

Tested in Triton's interpreter and compiled ahead of time (tests/build/test_compile_only.py); not run on a GPU.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton

from inr_kernels._core import backends

from .attention import attend, attend_mean
from .gradients import bias_backward, key_value_backward, query_backward

TY, TX, BN = 4, 8, 16
MOST_OFFSETS = 32  # per axis, whose bias gradients a program of `query_backward` sums in registers
# Of a program of `bias_backward`, for more: queries in all, queries x channels at a time.
QUERIES, CHANNELS = 4096, 4096
WIDE, BLOCK = 256, 128  # the most channels of values in registers, and of a block of more

why_not = backends.why_not_dot


class _Problem:
    """A call's tensors, and the arguments of its launches."""

    def __init__(self, qkv, rpb, kernel_size, dilation, stride, is_causal, scale, mean_heads):
        tensors = qkv[0].unbind(-3) if len(qkv) == 1 else qkv
        self.tensors = [_volume(t if t.stride(-1) == 1 else t.contiguous()) for t in tensors]
        query, key, value = self.tensors
        self.rpb, self.mean_heads = None if rpb is None else rpb.contiguous(), mean_heads
        (self.batch, *queries, self.heads, dim), dim_v = query.shape, value.shape[-1]
        missing = 3 - len(kernel_size)
        kernel_size, self.dilation, stride = ((*[1] * missing, *option) for option in (kernel_size, dilation, stride))
        causal = [False] * missing + [bool(flag) for flag in is_causal]
        self.size = tuple(key.shape[1:-2])
        ratio = tuple(map(triton.cdiv, queries, self.size))
        self.share = tuple(self.heads // t.shape[-2] for t in (key, value))
        block, block_v = (max(16, triton.next_power_of_2(n)) for n in (dim, dim_v))
        block_v = block_v if block_v <= WIDE else BLOCK
        widest = max(block, block_v)
        is_small = widest * query.element_size() <= 256 and dim_v <= WIDE
        height = TY if is_small else TY // 2  # more would spill registers
        self.ratio, self.blocks = ratio, triton.cdiv(dim_v, block_v)
        self.shape = self.size, tuple(queries), ratio, self.heads, self.share, dim, dim_v, scale
        self.shape += kernel_size, self.dilation, stride
        self.kernel_size = kernel_size
        self.forms: dict[str, Any] = dict(zip(("CAUSAL_Z", "CAUSAL_Y", "CAUSAL_X"), causal, strict=True)) | {
            "BD": block,
            "BV": block_v,
        }
        self.tiles = self.forms | {"PRECISION": backends.precision(), "TY": height, "TX": TX, "BN": BN}
        # Without a limit ptxas would spill registers in order to fit more programs.
        self.tiles |= {"num_warps": 4 if widest <= 64 else 8, "num_stages": 1, "maxnreg": 255}

    def grid(self, heads, ratio, blocks=1):
        """A program for every tile, head, and block of values."""
        sides = zip(self.size[1:], self.dilation[1:], ratio[1:], (self.tiles["TY"], TX), strict=True)
        tiles = (d * triton.cdiv(triton.cdiv(n, d) * r, side) for n, d, r, side in sides)
        return self.batch * self.size[0] * math.prod(tiles) * heads, blocks

    def forward(self, out, lse):
        out = _volume(out)
        value_out, blocks = (None, 1) if self.mean_heads else (out, self.blocks)
        arguments = *self.tensors, self.rpb, *map(_strides, (out, *self.tensors)), *self.shape
        attend[self.grid(self.heads, self.ratio, blocks)](value_out, lse, *arguments, **self.tiles)
        if self.mean_heads:
            attend_mean[self.grid(1, self.ratio, self.blocks)](out, lse, *arguments, **self.tiles)

    def backward(self, grad, grad_lse, lse, d_query, d_key, d_value, needs_rpb):
        """Writes the gradients that are not None; returns d_rpb or None."""
        grad, d_query, d_key, d_value = map(_volume, (grad, d_query, d_key, d_value))
        delta = torch.empty_like(lse)
        grad_scale = 1 / self.heads if self.mean_heads else 1.0
        grad = grad.expand(-1, -1, -1, -1, self.heads, -1)
        given, shape = (grad, *self.tensors), (*self.shape, grad_scale)
        grid = self.grid(self.heads, self.ratio)
        planes, *offsets = (2 * n - 1 for n in self.kernel_size)
        in_tiles = needs_rpb and planes == 1 and max(offsets) <= MOST_OFFSETS
        rows, columns = map(triton.next_power_of_2, offsets) if in_tiles else (1, 1)
        shares = lse.new_empty(grid[0] // self.heads, *self.rpb.shape) if in_tiles else None
        if in_tiles and d_query is None:
            d_query = torch.empty_like(self.tensors[0])
        query_backward[grid](
            d_query, delta, shares, grad, grad_lse, lse, *self.tensors, self.rpb,
            *map(_strides, (grad if d_query is None else d_query, *given)), *shape, **self.tiles, NV=self.blocks,
            RY=rows, RX=columns,
        )  # fmt: skip
        if d_key is not None:
            group = math.lcm(*self.share)
            key_value_backward[self.grid(self.heads // group, (1, 1, 1), self.blocks)](
                d_key, d_value, grad, delta, lse, *self.tensors, self.rpb,
                *map(_strides, (d_key, d_value, *given)), *shape, **self.tiles, NV=self.blocks, GROUP=group,
            )  # fmt: skip
        if not needs_rpb:
            return None
        if shares is not None:
            return shares.sum(0)
        count = lse.numel() // self.heads
        shares = lse.new_empty(triton.cdiv(count, QUERIES), *self.rpb.shape)
        widest = max(self.forms["BD"], self.forms["BV"])
        bias_backward[(shares.numel(),)](
            shares, grad, delta, lse, *self.tensors, self.rpb, *map(_strides, given), *shape, count,
            QUERIES=QUERIES, BP=max(1, CHANNELS // widest), NV=self.blocks, maxnreg=255, **self.forms,
        )  # fmt: skip
        return shares.sum(0)


def _volume(tokens):
    """A view [B, D, H, W, heads, dim] of tokens with fewer axes; None of None."""
    if tokens is None:
        return None
    for _ in range(6 - tokens.dim()):
        tokens = tokens.unsqueeze(1)
    return tokens


def _strides(tokens):
    return tokens.stride()[:5]


def forward(qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the op's arguments (op.py), returns out [B, ..., heads, dim_v] and lse [B, ..., heads]."""
    p = _Problem(qkv, rpb, *rest)
    query = qkv[0].select(-3, 0) if len(qkv) == 1 else qkv[0]
    heads, dim_v = 1 if p.mean_heads else p.heads, qkv[-1].shape[-1]
    out = query.new_empty(*query.shape[:-2], heads, dim_v)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
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
    d_query, d_key, d_value = grads[0].unbind(-3) if len(qkv) == 1 and needs_qkv[0] else grads * (3 // len(qkv))
    if (d_key is None) != (d_value is None):  # the kernel writes both
        d_key, d_value = (
            torch.empty_like(t) if d is None else d for d, t in zip((d_key, d_value), p.tensors[1:], strict=True)
        )
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    with backends.on(grad.device):
        d_rpb = p.backward(grad, grad_lse.contiguous(), lse.contiguous(), d_query, d_key, d_value, needs_rpb)
    return grads, d_rpb
