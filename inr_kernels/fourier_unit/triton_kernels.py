"""The Triton backend of fourier_unit: its kernel, launch and block sizes.

One kernel multiplies the real and imaginary parts of a spectrum, as they are interleaved in memory, by a real matrix,
adds a shift and applies a ReLU. It computes the unit's convolution, and the DFT of a small map's columns
(op/dft_matmul.py).

Tested in Triton's interpreter and compiled ahead of time (tests/build/test_compile_only.py); not run on a GPU.
"""

import torch
import triton
import triton.language as tl

from inr_kernels._core import backends
from inr_kernels._core.dispatch import Facts

BLOCK = {"BM": 64, "BN": 64, "BK": 32}
WARPS = {"ieee": 4, "tf32": 8}  # others spill registers on some architecture


def why_not(facts: Facts) -> str:
    """Why the kernels cannot run, "" if they can."""
    if facts.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {str(facts.dtype).removeprefix('torch.')}"
    return ""


@triton.jit
def multiply(
    out,  # [B, G, M / 2, N, 2] contiguous float32
    z,  # [B, G, K / 2, N, 2] contiguous float32
    weight,  # [G, M, K] contiguous float32
    shift,  # [G, M] contiguous float32; or None
    G, M, K, N,
    RELU: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = weight z (+ shift), or its ReLU, for N frequencies. M and K are even.

    Row or column i of the matrix belongs to part i % 2 (real, imaginary) of channel i // 2.
    """
    unit, group, row = tl.program_id(2).to(tl.int64), tl.program_id(2) % G, tl.program_id(1) * BM
    i, k, n = tl.arange(0, BM), tl.arange(0, BK), tl.program_id(0) * BN + tl.arange(0, BN)
    m = row + i
    z += unit * K * N
    weight += group * M * K
    sums = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        inside = (first + k) < K
        w = tl.load(
            weight + (m * K)[:, None] + (first + k)[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0
        )
        at = (k // 2 * N * 2 + k % 2)[:, None] + 2 * n[None, :]
        values = tl.load(z + at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        sums += tl.dot(w, values, input_precision=PRECISION)
        z += BK * N
    if shift is not None:
        sums += tl.load(shift + group * M + m, mask=m < M, other=0.0)[:, None]
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)  # keeps NaN
    out += unit * M * N + row.to(tl.int64) * N
    at = (i // 2 * N * 2 + i % 2)[:, None] + 2 * n[None, :]
    tl.store(out + at, sums, mask=(m < M)[:, None] & (n < N)[None, :])


def product(z: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None, relu: bool, groups: int) -> torch.Tensor:
    """z [B, C, H, W'] complex, weight [2 O, 2 C / groups], shift [2 O] or None -> [B, O, H, W'] complex."""
    z, rows = torch.view_as_real(z.contiguous()), len(weight) // groups
    out = z.new_empty(len(z), len(weight) // 2, *z.shape[2:])
    count = z.shape[2] * z.shape[3]
    blocks = triton.cdiv(count, BLOCK["BN"]), triton.cdiv(rows, BLOCK["BM"])
    weight, shift = weight.contiguous(), None if shift is None else shift.contiguous()
    with backends.on(z.device):
        # The DFT of columns has as many units as there are channels in the batch.
        for units, given in backends.launches((out, z), groups):
            grid = *blocks, units * groups
            multiply[grid](
                *given, weight, shift, groups, rows, weight.shape[1], count,
                RELU=relu, PRECISION=backends.precision(), num_warps=WARPS[backends.precision()], **BLOCK,
            )  # fmt: skip
    return torch.view_as_complex(out)
