"""Packs bool tensors into bits. The backward of a ReLU needs only signs: a thirty-second of float32 values."""

import math
from collections.abc import Sequence

import numpy
import torch

# For eight bytes of 0 or 1 as an int64 (little-endian), the top byte of the product with _GATHER has their bits.
_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101  # times a byte: eight copies of it
_SELECT = -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201 as an int64: bit i in copy i


def pack(positive: torch.Tensor) -> torch.Tensor:
    """Packs a bool tensor of n elements into [ceil(n / 8)] uint8, the first element in the lowest bit."""
    flat = positive.flatten()
    return _packed_by_numpy(flat) if flat.device.type == "cpu" else _packed(flat)


def unpack(bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Returns the bool tensor of this shape that `pack` packed."""
    flat = _unpacked_by_numpy(bits) if bits.device.type == "cpu" else _unpacked(bits)
    return flat[: math.prod(shape)].view(*shape)


def select(grad: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Returns the gradient where a bit is set, else 0: the backward of a ReLU whose signs `pack` packed.

    For finite gradients; infinity gives NaN where no bit is set.
    """
    return unpack(bits, grad.shape).to(grad.dtype).mul_(grad)  # in a third of the time of torch.where


def _packed_by_numpy(flat):
    return torch.from_numpy(numpy.packbits(flat.numpy(), bitorder="little"))


def _unpacked_by_numpy(bits):
    return torch.from_numpy(numpy.unpackbits(bits.numpy(), bitorder="little").view(bool))


def _packed(flat):
    flat = torch.cat((flat, flat.new_zeros(-len(flat) % 8)))
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def _unpacked(bits):
    return ((bits.to(torch.int64) * _REPEAT) & _SELECT).view(torch.uint8).to(torch.bool)
