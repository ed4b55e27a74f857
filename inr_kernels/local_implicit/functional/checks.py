"""Checks of local_implicit's public arguments, and the dtype that it computes in."""

import contextlib
import math
from collections.abc import Sequence, Sized
from numbers import Real

import torch

from inr_kernels._core.checks import has_autocast, is_positive_int, require, require_tensor, result_dtype, shape

from .. import op
from ..arguments import check_count, check_dtypes, check_layer
from .hoist import Form, feature_columns

MAX_PIXELS = 2**40  # of an output; the number of bytes of more overflows in torch


def cast_parameters(
    requested: str, feat: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.dtype]:
    """Weights and biases in the dtype to compute in, and the dtype of the result.

    The result has feat's dtype, or autocast's. Half precision on a CPU is computed in float32, except for bfloat16
    inference where the processor multiplies it. The features are cast later, band by band; coordinates never are.
    """
    dtype = result_dtype(feat)
    if not has_autocast(feat):
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            check_dtypes(i, weight, bias, "feat", dtype)
    working = dtype
    if feat.device.type == "cpu" and requested in ("", "cpu") and dtype.itemsize == 2:
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (feat, *weights, *biases))
        if tracked or dtype == torch.float16 or not op.cpu_has_bfloat16():
            working = torch.float32
    return [w.to(working) for w in weights], [b.to(working) for b in biases], dtype


def check_decoder(
    feat: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    form: Form,
    *,
    cell_decode: bool,
) -> None:
    """Raises unless features and weights fit each other and the form."""
    require_tensor(feat, "feat", dims=(4,))
    require(min(feat.shape[1:]) > 0, "feat", "have at least one channel and one pixel, [B, C, h, w]", shape(feat))
    after = form.ensemble_after
    require(after in ("last", "first"), "ensemble_after", 'be "last" or "first"', repr(after))
    for value, name in ((weights, "weights"), (biases, "biases")):
        if not isinstance(value, Sized):
            raise TypeError(f"{name} must be a list of tensors; got {type(value).__name__}")
    require(len(weights) >= 2, "weights", "hold at least two Linear weights", len(weights))
    check_count(weights, biases)
    inputs = feature_columns(feat.shape[1], form) + 2 + (2 if cell_decode and after == "last" else 0)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if i == 1 and cell_decode and after == "first":
            inputs += 2
        check_layer(i, weight, bias, inputs, feat, f" ({_first_columns(feat, form, cell_decode)})" if i == 0 else "")
        inputs = len(weight)


def _first_columns(feat, form, cell_decode):
    features = f"{feat.shape[1]} channels" + (" x 9" if form.feat_unfold else "")
    return f"{features} + 2 offsets" + (" + 2 cell" if cell_decode and form.ensemble_after == "last" else "")


def check_queries(
    feat: torch.Tensor, coord: torch.Tensor, cell: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """coord and cell in float32; raises unless they fit feat."""
    require_tensor(coord, "coord", dims=(3, 4), like=feat)
    batch = len(feat)
    rule = f"have shape [B, Q, 2] or [B, H, W, 2] with B = feat's {batch}"
    require(coord.shape[-1] == 2 and len(coord) == batch, "coord", rule, shape(coord))
    if cell is not None:
        require_tensor(cell, "cell", dims=(2, coord.dim()), like=feat)
        fits = tuple(cell.shape) == (tuple(coord.shape) if cell.dim() > 2 else (batch, 2))
        require(fits, "cell", f"have shape [B, 2] = [{batch}, 2] or coord's {shape(coord)}", shape(cell))
    for value, name in ((coord, "coord"), (cell, "cell")):
        if value is not None and value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32: half precision is too coarse to find pixels; got {value.dtype}")
    return coord.float(), None if cell is None else cell.float()


def check_widths(in_channels: int, hidden: Sequence[int], out_channels: int) -> None:
    """Raises unless a decoder can have these widths."""
    fits = isinstance(hidden, Sequence) and hidden and all(map(is_positive_int, (in_channels, *hidden, out_channels)))
    rule = "be positive integers, hidden a sequence of them that is not empty"
    require(fits, "in_channels, hidden and out_channels", rule, f"{in_channels!r}, {hidden!r}, {out_channels!r}")


def check_workspace(workspace: float) -> None:
    """Raises unless workspace is a positive number of bytes."""
    fits = isinstance(workspace, Real) and not isinstance(workspace, bool) and workspace > 0
    require(fits, "workspace", "be a positive number of bytes", repr(workspace))


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """(H, W), both positive integers, of at most MAX_PIXELS together."""
    sides: tuple[int, ...] = ()
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        is_open = torch.compiler.is_exporting() and all(isinstance(n, (int, torch.SymInt)) for n in size)
        sides = tuple(size) if is_open else tuple(map(int, size))  # int() would fix a side that is left open
    fixed = [n for n in sides if not isinstance(n, torch.SymInt)]
    fits = len(sides) == 2 and sides == tuple(size) and all(n > 0 for n in fixed)
    require(fits, "size", "be two positive integers (H, W)", size)
    require(math.prod(fixed) <= MAX_PIXELS, "size", f"have at most {MAX_PIXELS} pixels", size)
    height, width = sides
    return height, width
