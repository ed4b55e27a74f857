"""LTE's decoder from its maps of coefficients and frequencies on, and its skip connection."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from inr_kernels._core import dispatch
from inr_kernels._core.checks import require, require_match, require_tensor, result_dtype, shape, without_autocast

from .. import op, reference
from ..arguments import Facts, check_count, check_layer
from .checks import cast_parameters, check_queries


def _facts(
    coef: torch.Tensor,
    freq: Any = None,
    coord: Any = None,
    cell: Any = None,
    phase_weight: Any = None,
    weights: Sequence[torch.Tensor] = (),
    *_: Any,
    **__: Any,
) -> Facts:
    """What decides on the backend of a call, of which `explain` may be given coef only."""
    return Facts(coef.device, result_dtype(coef), (coef.shape[1], *map(len, weights)) if weights else ())


@op.TEXTURE.public(_facts)
def local_texture_decode(
    coef: torch.Tensor,
    freq: torch.Tensor,
    coord: torch.Tensor,
    cell: torch.Tensor,
    phase_weight: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Decodes an implicit image at any coordinates from local coefficients and frequencies (LTE).

    For a query at `coord` with the four pixels t around it, rel_t and w_t as in `local_implicit_decode`:

        f_t = [freq_y[t]; freq_x[t]] rel_t + phase_weight rel_cell          (K angles in half turns)
        out = sum_t w_t MLP(coef[t] * [cos(pi f_t); sin(pi f_t)]),          MLP = Linear, ReLU, ..., Linear

    The last Linear is applied after the ensemble (exactly: the weights sum to 1). The kernels never store the basis
    functions or hidden states of all queries.

    Args:
        coef: coefficients [B, 2 K, h, w], of the K cosines first; float32, float64, bfloat16 or float16.
        freq: frequencies [B, 2 K, h, w], in LTE's order: channel 2 j is along y, 2 j + 1 along x. (LTE+ has those along
            y first; `LocalTextureDecoder.from_state_dict` reorders its weights.)
        coord: query centres (y, x) [B, Q, 2] or [B, H, W, 2], float32, as in `local_implicit_decode`.
        cell: query extents (y, x) in the units of coord, [B, 2] or coord's shape.
        phase_weight: [K, 2].
        weights: Linear weights [N1, 2 K], [N2, N1], ..., [out_channels, Nk], in coef's dtype.
        biases: [N1], [N2], ..., [out_channels].
        backend: "cpu", "reference", "triton" or None, see `inr_kernels.explain`.

    Returns:
        [B, Q, out_channels] or [B, H, W, out_channels] in coef's dtype (autocast's, under autocast).

    Gradients reach coef, freq, phase_weight, weights and biases on every backend; the rest of what
    `local_implicit_decode` says of gradients and dtypes holds, too.

    Raises:
        TypeError: an argument is no floating-point tensor; coord or cell in half precision.
        ValueError: a shape, dtype or device that does not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message gives the reason.

    Source: Lee and Jin, Local Texture Estimator for Implicit Representation Function, CVPR 2022, eq. 3-8.

    Example:
        >>> import torch
        >>> coef, freq = torch.randn(2, 1, 8, 5, 7)
        >>> coord, cell = torch.rand(1, 100, 2) * 2 - 1, torch.full((1, 2), 0.1)
        >>> weights, biases = [torch.randn(16, 8), torch.randn(3, 16)], [torch.zeros(16), torch.zeros(3)]
        >>> local_texture_decode(coef, freq, coord, cell, torch.randn(4, 2), weights, biases).shape
        torch.Size([1, 100, 3])
    """
    _check(coef, freq, phase_weight, weights, biases)
    require_tensor(cell, "cell")
    coord, cell = check_queries(coef, coord, cell)  # type: ignore[assignment]
    requested = dispatch.requested_backend(backend)
    weights, biases, dtype = cast_parameters(requested, coef, weights, biases)
    y, x, cell = as_planes(coord, cell)  # type: ignore[assignment]
    with without_autocast(coef):  # already applied
        texture = torch.cat((coef, freq[:, ::2], freq[:, 1::2]), 1).permute(0, 2, 3, 1)
        texture, phase_weight = (t.to(weights[0].dtype).contiguous() for t in (texture, phase_weight))
        requested = dispatch.reference_if_transformed(requested, texture, phase_weight, *weights, *biases)
        height = coef.shape[2]
        out = decode_texture(
            texture, y, x, cell, phase_weight, weights, biases, height, 0, True, requested=requested
        )  # fmt: skip
    return out.view(*coord.shape[:-1], out.shape[-1]).to(dtype)


def _check(coef, freq, phase_weight, weights, biases):
    """Raises unless the maps and the parameters fit each other."""
    require_tensor(coef, "coef", dims=(4,))
    channels = coef.shape[1]
    fits = min(coef.shape[1:]) > 0 and channels % 2 == 0
    require(fits, "coef", "have an even number of channels and at least one pixel, [B, 2 K, h, w]", shape(coef))
    require_tensor(freq, "freq", like=coef)
    require_match(freq, "freq", coef.shape, coef.dtype, coef.device)
    require_tensor(phase_weight, "phase_weight", dims=(2,), like=coef)
    require_match(phase_weight, "phase_weight", (channels // 2, 2), phase_weight.dtype, coef.device)
    require(len(weights), "weights", "hold at least one Linear weight", len(weights))
    check_count(weights, biases)
    inputs = channels
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_layer(i, weight, bias, inputs, coef, " (coef's channels)" if i == 0 else "")
        inputs = len(weight)


def as_planes(coord: torch.Tensor, cell: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y, x [B, R, S] and cell [B, R, S, 2] of coord [B, Q, 2] or [B, H, W, 2], and a cell like it or [B, 2]."""
    planes = coord.unsqueeze(1) if coord.dim() == 3 else coord
    if cell is not None:
        cell = cell[:, None, None] if cell.dim() == 2 else cell.view(planes.shape)
        cell = cell.expand(planes.shape)
    y, x = planes.unbind(-1)
    return y, x, cell


def decode_texture(
    texture: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    cell: torch.Tensor,
    *parameters: Any,
    requested: str,
) -> torch.Tensor:
    """The op local_texture, or the reference where it was requested or coordinates need gradients.

    parameters: those that follow `cell` in `reference.decode_texture`.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, cell)):
        if requested not in ("", "reference"):
            reason = "does not compute the gradients of coord and cell; use backend='reference'"
            raise RuntimeError(f"backend {requested!r} {reason}")
        requested = "reference"
    arguments = texture, y, x, cell, *parameters, False
    return reference.decode_texture(*arguments) if requested == "reference" else op.local_texture(*arguments, requested)


def interpolate(image: torch.Tensor, coord: torch.Tensor) -> torch.Tensor:
    """image [B, C, h, w] at coord [B, H, W, 2], bilinear, with the border's values outside: [B, H, W, C]."""
    dtype = torch.promote_types(image.dtype, torch.float32)  # coordinates are too coarse in half precision
    grid = coord.flip(-1).to(dtype)
    sampled = F.grid_sample(image.to(dtype), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.permute(0, 2, 3, 1)
