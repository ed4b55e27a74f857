"""The public functions of local implicit decoding: documentation, argument checks, autocast, the bands of `render`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import require, require_tensor, result_dtype, shape, without_autocast

from .. import op, reference
from ..arguments import Facts
from .checks import cast_parameters, check_decoder, check_queries, check_size, check_workspace
from .hoist import Form, feature_columns, hoist_features
from .mlp import mlp
from .texture import as_planes, decode_texture, interpolate, local_texture_decode

__all__ = ["WORKSPACE", "Form", "check_size", "check_workspace", "decode_queries", "feature_columns", "hoist_features"]
__all__ += ["interpolate", "local_implicit_decode", "local_texture_decode", "mlp", "render"]

WORKSPACE = 256 << 20
REPORTS, SHORTEST_BAND = 25, 16  # of `progress`: calls for an image, and the minimum rows per call


def _facts(
    feat: torch.Tensor,
    coord: Any = None,
    cell: Any = None,
    weights: Sequence[torch.Tensor] = (),
    *_: Any,
    ensemble_after: str = "last",
    **__: Any,
) -> Facts:
    """What decides on the backend of a call, of which `explain` may be given feat only."""
    return Facts(feat.device, result_dtype(feat), tuple(map(len, weights)), ensemble_after == "first")


@op.OP.public(_facts)
def local_implicit_decode(
    feat: torch.Tensor,
    coord: torch.Tensor,
    cell: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    feat_unfold: bool = True,
    local_ensemble: bool = True,
    ensemble_after: str = "last",
    backend: str | None = None,
) -> torch.Tensor:
    """Decodes an implicit image at any coordinates (LIIF).

    For a query at `coord` with the four pixels t around it (one, without `local_ensemble`):

        h_t = W1 [unfold3x3(feat)[t]; rel_t; rel_cell] + b1,    rel_t = (coord - centre_t) * (h, w)
        out = sum_t w_t MLP(ReLU(h_t)),   w_t = area of the rectangle to the opposite pixel / their sum

    W1 is applied to `feat` once per pixel of the feature map (exactly: the layer is linear), and the last Linear
    after the ensemble. The unfolded features are never stored, the hidden states of the queries at most in a bounded
    workspace.

    Args:
        feat: features [B, C, h, w], float32, float64, bfloat16 or float16; their pixels span [-1, 1].
        coord: query centres (y, x) [B, Q, 2] or [B, H, W, 2], float32 (float64 is rounded to it) in any range:
            outside [-1, 1] the border pixels extrapolate. Coordinates are float32 under autocast too.
        cell: query extents (y, x) in the units of coord, [B, 2] or coord's shape; None: a decoder without cell.
        weights: Linear weights: [N1, C*9 + 2 (+ 2 with cell)] (C instead of C*9 without `feat_unfold`), [N2, N1],
            ..., [out_channels, Nk], k >= 1, in feat's dtype. With `ensemble_after="first"` the cell's two columns
            are the last of the second weight instead.
        biases: [N1], [N2], ..., [out_channels].
        feat_unfold: the first layer reads a 3 x 3 neighbourhood, channel index c * 9 + ky * 3 + kx.
        local_ensemble: blend four neighbours, or take the nearest one.
        ensemble_after: "last" (LIIF) or "first": blend after the first layer's ReLU, then
            out = MLP([sum_t w_t ReLU(h_t); rel_cell]), once per query (the "split" INRB of IN2).
        backend: "cpu", "reference", "triton", "cuda" (C++, half precision; its backward is Triton's); None: the first
            of them that can run (see `inr_kernels.explain`).

    Returns:
        [B, Q, out_channels] or [B, H, W, out_channels] in feat's dtype (autocast's, under autocast).

    Gradients reach feat, weights and biases on every backend; on a CPU they are bitwise reproducible for a given number
    of threads. If coord or cell requires a gradient, the reference computes the whole call, as it does under torch.func
    and forward-mode differentiation. Second derivatives need `backend="reference"`; the kernels raise.

    In float64 the blending weights, functions of float32 coordinates, are float32: they sum to 1 within 1e-7.

    Raises:
        TypeError: an argument is no floating-point tensor; coord or cell in half precision.
        ValueError: a shape, dtype or device that does not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message gives the reason.

    Source: Chen, Liu and Wang, Learning Continuous Image Representation with Local Implicit Image Function,
    CVPR 2021, eq. 1-5; the arithmetic of the coordinates is that of its published code.

    Example:
        >>> import torch
        >>> feat, coord = torch.randn(1, 8, 5, 7), torch.rand(1, 100, 2) * 2 - 1
        >>> weights = [torch.randn(16, 8 * 9 + 2), torch.randn(3, 16)]
        >>> biases = [torch.zeros(16), torch.zeros(3)]
        >>> local_implicit_decode(feat, coord, None, weights, biases).shape
        torch.Size([1, 100, 3])
    """
    return decode_queries(
        feat,
        coord,
        cell,
        weights,
        biases,
        Form(feat_unfold, local_ensemble, ensemble_after),
        backend=backend,
    )


def decode_queries(
    feat: torch.Tensor,
    coord: torch.Tensor,
    cell: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    form: Form,
    *,
    backend: str | None = None,
    hoist: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """`local_implicit_decode`, where `hoist` may replace `hoist_features`, e.g. by a cache."""
    hoist = hoist or hoist_features
    check_decoder(feat, weights, biases, form, cell_decode=cell is not None)
    coord, cell = check_queries(feat, coord, cell)
    requested = dispatch.requested_backend(backend)
    weights, biases, dtype = cast_parameters(requested, feat, weights, biases)
    y, x, cell = as_planes(coord, cell)
    out = decode_grid(feat, y, x, cell, weights, biases, form, requested, hoist)
    return out.view(*coord.shape[:-1], out.shape[-1]).to(dtype)


def render(
    feat: torch.Tensor,
    size: Sequence[int],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    form: Form,
    *,
    cell_decode: bool = True,
    cell: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    workspace: int = WORKSPACE,
    backend: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> torch.Tensor:
    """Decodes the image of `size` (H, W): the decoder on the grid of its pixels, in bands of rows.

    In addition to input and output it needs at most `workspace` bytes, at any size. (With gradients enabled, what the
    backward needs is kept in addition; `backend="reference"` holds unfolded features, the Triton kernels for
    float32 up to 64 MB of hidden states.)

    Args:
        feat, weights, biases, backend: as local_implicit_decode.
        size: (H, W) of the output.
        form: the decoder's flags.
        cell_decode: whether the decoder takes a cell.
        cell: [B, 2], a query's extent; None: the output's pixel, (2 / H, 2 / W).
        image: [B, out_channels, H', W'], which is added, interpolated bilinearly (LTE's skip connection).
        workspace: bytes, at least what one output row of one image needs.
        progress: called after each band as progress(rows done, rows in all), B * H in the end.

    Returns:
        [B, out_channels, H, W].
    """
    height, width = check_size(size)
    check_workspace(workspace)
    check_decoder(feat, weights, biases, form, cell_decode=cell_decode)
    require(cell is None or cell_decode, "cell", "be None for a decoder without cell", "a tensor")
    if cell is not None:
        require_tensor(cell, "cell", dims=(2,), like=feat)
        require(shape(cell) == [len(feat), 2], "cell", f"have shape [B, 2] with B = {len(feat)}", shape(cell))
    elif cell_decode:
        sides = (feat.new_full((len(feat),), 2 / n, dtype=torch.float32) for n in (height, width))
        cell = torch.stack(tuple(sides), -1)
    y, x = op.centres(height, feat.device), op.centres(width, feat.device)
    requested = dispatch.requested_backend(backend)
    weights, biases, dtype = cast_parameters(requested, feat, weights, biases)
    if torch.compiler.is_exporting():  # in one band: an exported graph may leave the size open
        grid = (len(feat), height, width)
        at = None if cell is None else cell[:, None, None].float().expand(*grid, 2)
        rows, columns = y[:, None].expand(grid), x.expand(grid)
        out = decode_grid(feat, rows, columns, at, weights, biases, form, requested, hoist_features)
        if image is not None:
            out = out + interpolate(image, torch.stack((rows, columns), -1)).to(out.dtype)
        return out.permute(0, 3, 1, 2).to(dtype)
    out = feat.new_empty(len(feat), len(weights[-1]), height, width, dtype=dtype)
    for images, top, bottom, rows in plan_bands(
        tuple(feat.shape),
        weights[0].element_size(),
        (height, width),
        tuple(map(len, weights)),
        form,
        workspace,
        size[0] if progress is None else max(SHORTEST_BAND, -(-size[0] // REPORTS)),
    ):
        part = feat[images]
        grid = (len(part), bottom - top, width)
        band = decode_grid(
            part,
            y[top:bottom, None].expand(grid),
            x.expand(grid),
            None if cell is None else cell[images, None, None].float().expand(*grid, 2),
            weights,
            biases,
            form,
            requested,
            functools.partial(hoist_features, rows=rows),
            rows[0],
        )
        if image is not None:
            coord = torch.stack((y[top:bottom, None].expand(grid), x.expand(grid)), -1)
            band = band + interpolate(image[images], coord).to(band.dtype)
        out[images, :, top:bottom] = band.permute(0, 3, 1, 2)
        if progress is not None:
            progress(images.start * height + len(part) * bottom, len(feat) * height)
    return out


def decode_grid(
    feat: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    cell: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    form: Form,
    requested: str,
    hoist: Callable[..., torch.Tensor],
    band_start: int = 0,
) -> torch.Tensor:
    """y, x [B, R, S], cell [B, R, S, 2] -> [B, R, S, out_channels]; `hoist` may cover a band of feature rows."""
    with without_autocast(feat):  # already applied
        return _decode_grid(feat, y, x, cell, weights, biases, form, requested, hoist, band_start)


def _decode_grid(feat, y, x, cell, weights, biases, form, requested, hoist, band_start):
    coordinates = [y, x] if cell is None else [y, x, cell]
    needs_coordinates = torch.is_grad_enabled() and any(t.requires_grad for t in coordinates)
    requested = dispatch.reference_if_transformed(requested, feat, *coordinates, *weights, *biases)
    columns = feature_columns(feat.shape[1], form)
    if form.texture:
        hoisted, phase = hoist(feat, weights[0], biases[0], form), weights[0][: len(weights[0]) // 4, columns:]
        texture = hoisted, y, x, cell, phase, weights[1:], biases[1:], feat.shape[2], band_start, form.local_ensemble
        return decode_texture(*texture, requested=requested)
    if needs_coordinates and requested not in ("", "reference"):
        reason = "does not compute the gradients of coord and cell; use backend='reference'"
        raise RuntimeError(f"backend {requested!r} {reason}")
    exporting = torch.compiler.is_exporting()
    if needs_coordinates or (requested == "reference" and not exporting):
        feat, coord = feat.to(weights[0].dtype), torch.stack((y, x), -1)
        return reference.local_implicit(feat, coord, cell, weights, biases, **form.flags())
    arguments = (
        hoist(feat, weights[0], biases[0], form),
        y,
        x,
        cell,
        weights[0][:, columns:],
        weights[1:],
        biases[1:],
        feat.shape[2],
        band_start,
        form.local_ensemble,
        form.ensemble_after == "first",
    )
    return reference.decode(*arguments) if requested == "reference" else op.local_implicit(*arguments, requested)


class Band(NamedTuple):
    """A band of `render`: images, output rows [top, bottom), and the feature rows [begin, end) that it reads."""

    images: slice
    top: int
    bottom: int
    rows: tuple[int, int]


@torch.compiler.assume_constant_result
def plan_bands(
    feat_shape: Sequence[int],
    element_size: int,
    size: tuple[int, int],
    widths: Sequence[int],
    form: Form,
    workspace: int,
    longest: int,
) -> list[Band]:
    """The bands of `render` for features [B, C, h, w] and layers of these widths.

    They take at most `workspace` bytes, and have at most `longest` rows.
    """
    batch, channels, height, width = feat_shape
    # The padded features, the convolution's own buffer (at worst its unfolded input) and its output, in the
    # working precision and, for half precision on a CPU, once more in float32.
    row_bytes = width * (feature_columns(channels, form) + 2 * channels + 2 * widths[0]) * (element_size + 4)
    query_bytes = size[1] * 2 * widths[-1] * (element_size + 4)
    sides, eps = ((-1, 1), 1e-6) if form.local_ensemble else ((0, 0), 0)
    y = reference.pixel_centres(size[0], "cpu")
    first, last = (reference.nearest_pixel(y, height, side, eps)[0].tolist() for side in sides)

    def cost(top, bottom):
        return (last[bottom - 1] + 3 - first[top]) * row_bytes + (bottom - top) * query_bytes

    min_bytes = max(cost(row, row + 1) for row in range(size[0]))
    require(workspace >= min_bytes, "workspace", f"be at least {min_bytes} bytes for these shapes", workspace)
    images = max(1, min(batch, workspace // min_bytes))
    bands = []
    for image in range(0, batch, images):
        top = 0
        for bottom in range(1, size[0] + 1):
            if bottom in (size[0], top + longest) or images * cost(top, bottom + 1) > workspace:
                rows = first[top], last[bottom - 1] + 1
                bands.append(Band(slice(image, image + images), top, bottom, rows))
                top = bottom
    return bands
