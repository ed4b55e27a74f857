"""The position of queries on the map, and the first layer there: the start of all Triton kernels of this folder."""

from typing import NamedTuple

import triton
import triton.language as tl


class Axis(NamedTuple):
    """One axis of the map; the floats are computed in double precision and rounded once."""

    size: int
    low: float  # added to a coordinate to find its lower neighbour
    high: float  # and its upper neighbour
    centre: float  # of the first pixel
    step: float  # between centres


class Queries(NamedTuple):
    """The queries [begin, end) of [B, R, S], flattened, and the band of the map that they read."""

    y: object  # [B, R, S] float32, strides y_strides
    x: object  # [B, R, S] float32, strides x_strides
    cell: object  # [B, R, S, 2] float32, strides cell_strides; or None
    y_strides: tuple
    x_strides: tuple
    cell_strides: tuple
    rows: int  # R
    cols: int  # S
    begin: int
    end: int
    vertical: Axis
    horizontal: Axis
    band_start: int
    band_rows: int


@triton.jit
def nearest(coord, shift, axis):
    """The pixel nearest to coord + shift (ties to even, NaN to 0), and coord's offset from it in half pixels."""
    moved = coord + shift
    moved = tl.where(moved < -1 + 1e-6, -1 + 1e-6, moved)
    moved = tl.where(moved > 1 - 1e-6, 1 - 1e-6, moved)
    place = ((moved + 1) * axis.size - 1) * 0.5
    whole = tl.floor(place)
    rest = place - whole
    odd = whole != 2 * tl.floor(whole * 0.5)
    whole = tl.where((rest > 0.5) | ((rest == 0.5) & odd), whole + 1, whole)
    last = axis.size - 1
    index = tl.where(whole >= 0, tl.where(whole < last, whole, last), 0).to(tl.int32)
    centre = axis.centre + axis.step * index.to(tl.float32)
    return index, (coord - centre) * axis.size


@triton.jit
def locate(first, i, queries, ENSEMBLE: tl.constexpr, CELL: tl.constexpr):
    """The neighbours and the cell of the queries first (int64) + i [M].

    Returns (the band's first row in the batch, ys, xs, cell_y, cell_x), where ys and xs are the lower neighbour, the
    offset from it, the upper neighbour and the offset from it. Rows outside the band are clamped to it, which keeps
    reads in bounds.
    """
    col = (first % queries.cols).to(tl.int32) + i
    row = (first // queries.cols % queries.rows).to(tl.int32) + col // queries.cols
    batch = (first // queries.cols // queries.rows).to(tl.int32) + row // queries.rows
    col, row, batch = col % queries.cols, (row % queries.rows).to(tl.int64), batch.to(tl.int64)
    at = queries.y_strides
    y = tl.load(queries.y + batch * at[0] + row * at[1] + col * at[2])
    at = queries.x_strides
    x = tl.load(queries.x + batch * at[0] + row * at[1] + col * at[2])
    bottom = queries.band_rows - 1
    y_low, rel_y_low = nearest(y, queries.vertical.low, queries.vertical)
    x_low, rel_x_low = nearest(x, queries.horizontal.low, queries.horizontal)
    y_low = tl.minimum(tl.maximum(y_low - queries.band_start, 0), bottom)
    y_high, rel_y_high, x_high, rel_x_high = y_low, rel_y_low, x_low, rel_x_low
    if ENSEMBLE:
        y_high, rel_y_high = nearest(y, queries.vertical.high, queries.vertical)
        x_high, rel_x_high = nearest(x, queries.horizontal.high, queries.horizontal)
        y_high = tl.minimum(tl.maximum(y_high - queries.band_start, 0), bottom)
    cell_y, cell_x = rel_y_low, rel_x_low  # placeholders, unused without CELL
    if CELL:
        at = queries.cell_strides
        cell = queries.cell + batch * at[0] + row * at[1] + col * at[2]
        cell_y = tl.load(cell) * queries.vertical.size
        cell_x = tl.load(cell + at[3]) * queries.horizontal.size
    ys = y_low, rel_y_low, y_high, rel_y_high
    xs = x_low, rel_x_low, x_high, rel_x_high
    return batch.to(tl.int32) * queries.band_rows, ys, xs, cell_y, cell_x


@triton.jit
def neighbour(t, image, ys, xs, queries, ENSEMBLE: tl.constexpr):
    """Neighbour t [M] of the queries that `locate` found: pixel, rel_y, rel_x, ensemble weight."""
    y_low, rel_y_low, y_high, rel_y_high = ys
    x_low, rel_x_low, x_high, rel_x_high = xs
    below = t >= 2
    right = t % 2 == 1
    row = tl.where(below, y_high, y_low)
    col = tl.where(right, x_high, x_low)
    rel_y = tl.where(below, rel_y_high, rel_y_low)
    rel_x = tl.where(right, rel_x_high, rel_x_low)
    opposite = tl.abs(rel_y * rel_x) + 1e-9
    total = opposite
    if ENSEMBLE:
        total = tl.abs(rel_y_low * rel_x_low) + 1e-9
        total += tl.abs(rel_y_low * rel_x_high) + 1e-9
        total += tl.abs(rel_y_high * rel_x_low) + 1e-9
        total += tl.abs(rel_y_high * rel_x_high) + 1e-9
        far_y, far_x = tl.where(below, rel_y_low, rel_y_high), tl.where(right, rel_x_low, rel_x_high)
        opposite = tl.abs(far_y * far_x) + 1e-9
    pixel = (image + row) * queries.horizontal.size + col
    return pixel, rel_y, rel_x, opposite / total


@triton.jit
def plus_outer(total, column, row):
    """total [M, C] + column [M] x row [C], with fused multiply-adds."""
    column, row = tl.broadcast(column[:, None], row[None, :])
    return tl.fma(column, row, total)


@triton.jit
def first_layer(
    hoisted,  # [pixels, N1]
    position,  # [4, W] float32: columns of the position weight
    pixel, rel_y, rel_x, cell_y, cell_x, n, N1: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ReLU(hoisted[pixel] + position weight [rel; cell]) of samples [M] and channels n [C], float32."""
    row = hoisted + pixel.to(tl.int64) * N1
    v = tl.load(row[:, None] + n[None, :], mask=n[None, :] < N1, other=0.0).to(tl.float32)
    v = plus_outer(v, rel_y, tl.load(position + n))
    v = plus_outer(v, rel_x, tl.load(position + W + n))
    if COLUMNS == 4:
        v = plus_outer(v, cell_y, tl.load(position + 2 * W + n))
        v = plus_outer(v, cell_x, tl.load(position + 3 * W + n))
    return tl.where(v < 0, 0.0, v)  # keeps NaN


@triton.jit
def sincos_pi(x):
    """sin(pi x) and cos(pi x) by Taylor series, accurate to 2^-23: the reduction of x to |r| <= 1 / 4 is exact."""
    quarters = tl.floor(2 * x + 0.5)
    r = x - 0.5 * quarters
    r2 = r * r
    s = -0.5992645293207921 + r2 * 0.08214588661112823
    s = r * (3.141592653589793 + r2 * (-5.16771278004997 + r2 * (2.550164039877345 + r2 * s)))
    c = 0.2353306303588932 - r2 * 0.02580689139001406
    c = 4.058712126416768 + r2 * (-1.3352627688545893 + r2 * c)
    c = 1 + r2 * (-4.934802200544679 + r2 * c)
    turn = quarters - 4 * tl.floor(quarters * 0.25)
    odd = (turn == 1) | (turn == 3)
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where(turn >= 2, -sine, sine), tl.where((turn == 1) | (turn == 2), -cosine, cosine)


@triton.jit
def waves(
    texture,  # [pixels, 2 N1]: N1 / 2 coefficients of cosines, of sines, frequencies along y, along x
    position,  # [4, W] float32: columns of the phase's weight
    pixel, rel_y, rel_x, cell_y, cell_x, n, N1: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The sines and cosines of the frequencies n [C] at samples [M], float32."""
    K: tl.constexpr = N1 // 2
    row = texture + pixel.to(tl.int64) * 2 * N1
    known = n < K
    rel_y, cell_y = rel_y[:, None], cell_y[:, None]
    angle = tl.load(row[:, None] + (N1 + n)[None, :], mask=known[None, :], other=0.0).to(tl.float32) * rel_y
    along_x = tl.load(row[:, None] + (N1 + K + n)[None, :], mask=known[None, :], other=0.0).to(tl.float32)
    angle += along_x * rel_x[:, None]
    angle = plus_outer(angle, cell_x, tl.load(position + W + n, mask=known, other=0.0))
    return sincos_pi(angle + cell_y * tl.load(position + n, mask=known, other=0.0)[None, :])


@triton.jit
def texture_layer(
    texture, position, pixel, rel_y, rel_x, cell_y, cell_x, n, N1: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """LTE's first layer of samples [M] and channels n [C]: coefficients times cosines or sines; see `waves`."""
    K: tl.constexpr = N1 // 2
    is_sine = n >= K
    wave = tl.where(is_sine, n - K, n)
    sine, cosine = waves(texture, position, pixel, rel_y, rel_x, cell_y, cell_x, wave, N1, W)
    row = texture + pixel.to(tl.int64) * 2 * N1
    coef = tl.load(row[:, None] + n[None, :], mask=n[None, :] < N1, other=0.0).to(tl.float32)
    return coef * tl.where(is_sine[None, :], sine, cosine)
