"""Matrix products in Triton's interpreter: of bfloat16, which it computes wrongly, and rounded as tensor cores round.

The interpreter stores bfloat16 as 16-bit integers, multiplies these, and truncates where a GPU rounds to the nearest.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BLOCK = 8  # products that a tensor core adds at once
BITS = 24  # of the largest of them, below which it drops the others' bits


def values(handle):
    """A tensor's numbers, as float32 or float64."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def to_bfloat16(data):
    """Bits of float32 numbers, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FFF), rounded)


def toward_zero(exact):
    """float64 to float32, toward zero."""
    near = exact.astype(np.float32)
    return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


def to_tf32(data, nearest=False):
    """float32 with the lowest 13 bits cut off, as tensor cores read it, or rounded to the nearest (cvt.rna.tf32)."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    return (bits + np.uint32(0x1000 * nearest) & np.uint32(0xFFFFE000)).view(np.float32)


def truncated_product(a, b, d):
    """d + a @ b with exact products, `BLOCK` of which are added at a time.

    Of d and the products of a block, bits that are more than `BITS` below the largest are cut off, and the sum is
    truncated to float32.
    """
    for k in range(0, a.shape[1], BLOCK):
        terms = a[:, None, k : k + BLOCK].astype(np.float64) * b.T[None, :, k : k + BLOCK]
        terms = np.concatenate([d[..., None], terms], 2)
        unit = np.exp2(np.frexp(np.abs(terms).max(2, keepdims=True))[1] - BITS).astype(np.float64)
        d = toward_zero((np.trunc(terms / unit) * unit).sum(2))
    return d


def exact_product(a, b, d):
    """d + a @ b; products of bfloat16 are exact in float32."""
    return np.matmul(a, b, dtype=d.dtype) + d


def product_of_tensor_cores(a, b, d, precision):
    """d + a @ b; precision: Triton's, of float32 factors; None for half precision."""
    if precision == "ieee" or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return exact_product(a, b, d)
    if precision is None:
        return truncated_product(a, b, d)
    if precision == "tf32":
        return truncated_product(to_tf32(a), to_tf32(b), d)
    # As Triton compiles it: products of the high and the low parts, the small ones first, and d last.
    high_a, high_b = to_tf32(a, nearest=True), to_tf32(b, nearest=True)
    sums = truncated_product(to_tf32(a - high_a), high_b, np.zeros_like(d))
    sums = truncated_product(high_a, to_tf32(b - high_b), sums)
    return truncated_product(high_a, high_b, sums) + d


@contextlib.contextmanager
def interpreted(truncate: bool = False) -> Iterator[None]:
    """In the block, the interpreter multiplies bfloat16, and rounds to it.

    truncate: whether products are rounded as tensor cores do; else they are exact, and summed in float32.
    """
    original = InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = values(a), values(b)
        if truncate:
            is_float32 = a.dtype.scalar == tl.float32
            precision = str(input_precision).rpartition(".")[2].lower() if is_float32 else None
            out = product_of_tensor_cores(left, right, d.data, precision)
        else:
            out = exact_product(left, right, d.data)
        return TensorHandle(out.astype(d.data.dtype), d.dtype.scalar)

    def cast(self, source, target, *rounding):
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return TensorHandle(values(source), tl.float32)
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        return original(self, source, target)

    with contextlib.ExitStack() as stack:
        for name, replacement in {"create_dot": create_dot, "cast_impl": cast, "create_fp_to_fp": cast}.items():
            stack.enter_context(mock.patch.object(interpreter.InterpreterBuilder, name, replacement))
        yield
