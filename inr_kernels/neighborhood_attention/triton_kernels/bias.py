"""The gradient of neighborhood_attention's relative position bias, of a tile of queries."""

import triton
import triton.language as tl


@triton.jit
def by_offset(
    d_scores, t, c, iy, ix, kernel,
    TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
):  # fmt: skip
    """The sums [RY, RX] of the gradients of scores [TY TX, BN] over the pairs of an offset (y + Kh - 1, x + Kw - 1).

    The keys are in row t, from column c on; iy, ix: the queries' positions, the same in a row or column of the tile.
    Gradients outside the windows are zero.
    """
    columns = tl.arange(0, RX)[None, :] - kernel[2] + 1 + ix[:, None] - c
    exists = (columns >= 0) & (columns < BN)
    sums = tl.where(exists, tl.gather(d_scores, tl.where(exists, columns, 0), 1), 0.0)
    rows = tl.sum(tl.reshape(sums, [TY, TX, RX]), 1)
    steps = t - tl.max(tl.reshape(iy, [TY, TX]), 1) + kernel[1] - 1
    here = steps[:, None, None] == tl.arange(0, RY)[None, :, None]
    return tl.sum(tl.where(here, rows[:, None, :], 0.0), 0)


@triton.jit
def store_offsets(
    shares,  # [programs, 1, 2 Kh - 1, 2 Kw - 1] float32
    sums, kernel, RY: tl.constexpr, RX: tl.constexpr,
):  # fmt: skip
    """Stores the program's sums [RY, RX]."""
    height, width = 2 * kernel[1] - 1, 2 * kernel[2] - 1
    y, x = tl.arange(0, RY)[:, None], tl.arange(0, RX)[None, :]
    at = shares + tl.program_id(0).to(tl.int64) * height * width + y * width + x
    tl.store(at, sums, mask=(y < height) & (x < width))
