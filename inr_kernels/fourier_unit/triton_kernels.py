"""The Triton backend of fourier_unit: its kernel, launches, block sizes. Proven in Triton's interpreter and compiled
ahead of time (tests/test_compile_only.py); not run on a GPU.

One kernel multiplies the parts of a spectrum by a real matrix, adds and takes the ReLU, where they lie. With the
channels as rows it is the unit's convolution; with the rows of one channel's map as "channels", and cosines and sines
as the matrix, it is a discrete Fourier transform of the columns. So small maps, where a transform as a matrix product
is a launch or two and any size is as good as a power of two, go without an FFT: rows by torch's product, columns by
this. Larger ones take torch's FFT in float32.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl

from . import reference

BLOCK = {"BM": 64, "BN": 64, "BK": 32}
WARPS = {"ieee": 4, "tf32": 8}  # otherwise some chip spills
LONGEST = 64  # sides up to which the transform is a matrix product


def why_not(facts) -> str:
    """Why the kernels cannot run, "" if they can."""
    if facts.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {str(facts.dtype).removeprefix('torch.')}"
    return ""


@triton.jit
def mix(
    out, z, weight, shift, G, M, K, N,
    RELU: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [B, G, M / 2, N, 2] = weight [G, M, K] z [B, G, K / 2, N, 2] (+ shift [G, M]), or its ReLU; M and K are even.

    Row or column i of a matrix stands for part i % 2 of channel i // 2.
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
        sums = tl.where(sums < 0, 0.0, sums)  # hands a NaN on
    out += unit * M * N + row.to(tl.int64) * N
    at = (i // 2 * N * 2 + i % 2)[:, None] + 2 * n[None, :]
    tl.store(out + at, sums, mask=(m < M)[:, None] & (n < N)[None, :])


def precision():
    """How tl.dot multiplies float32, as torch.matmul does."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _on(device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def product(z, weight, shift, relu, groups):
    """z [B, C, H, W'] complex, weight [2 O, 2 C / groups], shift [2 O] or None -> [B, O, H, W'] complex."""
    z, rows = torch.view_as_real(z.contiguous()), len(weight) // groups
    out = z.new_empty(len(z), len(weight) // 2, *z.shape[2:])
    count = z.shape[2] * z.shape[3]
    grid = triton.cdiv(count, BLOCK["BN"]), triton.cdiv(rows, BLOCK["BM"]), len(z) * groups
    weight, shift = weight.contiguous(), None if shift is None else shift.contiguous()
    with _on(z.device):
        mix[grid](
            out, z, weight, shift, groups, rows, weight.shape[1], count,
            RELU=relu, PRECISION=precision(), num_warps=WARPS[precision()], **BLOCK,
        )  # fmt: skip
    return torch.view_as_complex(out)


@functools.lru_cache(maxsize=32)
def _factors(height, width, device):
    """Of both directions: the rows' matrices [W, 2 W'] and [2 W', W], the columns' [2 H, 2 H] and their inverse."""
    like = torch.zeros((), dtype=torch.float64, device=device)
    cos, sin = reference.dft_factors(width, width // 2 + 1, like)
    times = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    times[0] = 1
    if width % 2 == 0:
        times[-1] = 1
    rows = torch.stack((cos, -sin), 2).flatten(1)
    rows_back = (torch.stack((cos, -sin), 2) * times[:, None]).flatten(1).T
    cos, sin = reference.dft_factors(height, height, like)
    columns = torch.stack((torch.stack((cos, sin), 2), torch.stack((-sin, cos), 2)), 1).flatten(2).flatten(0, 1)
    return tuple(t.float().contiguous() for t in (rows, rows_back, columns, columns.T))


def transform(x, norm):
    """x [B, C, H, W] float32 -> its half spectrum [B, C, H, W // 2 + 1], complex."""
    height, width = x.shape[2:]
    if max(height, width) > LONGEST:
        return torch.fft.rfftn(x, dim=(-2, -1), norm=norm)
    rows, _, columns, _ = _factors(height, width, x.device)
    z = torch.view_as_complex((x @ (rows * reference.norm_factor(height * width, norm, False))).unflatten(3, (-1, 2)))
    return product(z.flatten(0, 1).unsqueeze(2), columns, None, False, 1).view(z.shape)


def inverse(z, size, norm):
    """The image [B, C, H, W] of a half spectrum that need not be Hermitian, as numpy's irfft2."""
    height, width = size
    if max(height, width) > LONGEST:
        return reference.inverse(z, size, norm)
    _, rows, _, columns = _factors(height, width, z.device)
    z = product(z.flatten(0, 1).unsqueeze(2), columns, None, False, 1).view(z.shape)
    return torch.view_as_real(z).flatten(3) @ (rows * reference.norm_factor(height * width, norm, True))
