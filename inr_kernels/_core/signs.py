"""Packs the signs of a ReLU's outputs into bits, all that its backward needs: a thirty-second of float32 values."""

import math
from collections.abc import Sequence

import torch

from . import backends, native

# For eight bytes of 0 or 1 as an int64 (little-endian), the top byte of the product with _GATHER has their bits.
_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101  # times a byte: eight copies of it
_SELECT = -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201 as an int64: bit i in copy i


def pack(x: torch.Tensor) -> torch.Tensor:
    """Packs x > 0, of n elements, into [ceil(n / 8)] uint8, the first element in the lowest bit."""
    if not _is_for_native(x):
        return _packed((x > 0).flatten())
    x = x.contiguous()
    bits = x.new_empty(-(-x.numel() // 8), dtype=torch.uint8)
    native.load()[0].pack_signs(x=x.data_ptr(), bits=bits.data_ptr(), **_problem(x))
    return bits


def select(grad: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Returns the gradient where a bit is set, else 0: the backward of a ReLU whose output `pack` packed."""
    if not _is_for_native(grad):
        return torch.where(unpack(bits, grad.shape), grad, 0)
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    native.load()[0].select_by_signs(grad=grad.data_ptr(), bits=bits.data_ptr(), out=out.data_ptr(), **_problem(grad))
    return out


def unpack(bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Returns, as a bool tensor of this shape, what `pack` packed."""
    copies = (bits.to(torch.int64) * _REPEAT) & _SELECT
    return copies.view(torch.uint8).to(torch.bool)[: math.prod(shape)].view(*shape)


def _is_for_native(x):
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and native.load()[0] is not None


def _problem(x):
    return {"type": backends.TYPES[x.dtype], "count": x.numel(), "threads": torch.get_num_threads()}


def _packed(flat):
    flat = torch.cat((flat, flat.new_zeros(-len(flat) % 8)))
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)
