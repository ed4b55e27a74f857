"""LIIF's and LTE's decoders and mlp in plain PyTorch: the definitions, for any dtype, differentiable without limit.

They follow the arithmetic of LIIF (Chen, Liu and Wang, CVPR 2021, eq. 1-5) including every float32 rounding of its
coordinates, which determines the ensemble's weights at odd scales. LTE (Lee and Jin, CVPR 2022) has the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

ACTIVATION: dict[str, Callable[..., torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu}  # of mlp


def pixel_centres(n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[n] float32: the centres of n pixels that span [-1, 1], rounded as LIIF's make_coord rounds them."""
    radius = 2 / (2 * _exact(n, device))
    return -1 + radius + (2 * radius) * torch.arange(n, dtype=torch.float32, device=device)


def _exact(n: int, device: torch.device | str) -> Any:
    """n, as a float64 tensor if an exported graph leaves it open: ONNX would compute with it in float32."""
    return torch.full((), n, dtype=torch.float64, device=device) if isinstance(n, torch.SymInt) else n


def nearest_pixel(coord: torch.Tensor, n: int, side: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of n pixels to coord [...] float32 shifted by `side` (-1, 0, 1) half pixels.

    Returns its index [...] int64, and the offset of coord from its centre in half pixels, [...] float32.
    """
    moved = (coord.detach() + (side * (2 / _exact(n, coord.device) / 2) + eps)).clamp(-1 + 1e-6, 1 - 1e-6)
    index = (((moved + 1) * n - 1) / 2).round().long().clamp(0, n - 1)
    return index, (coord - pixel_centres(n, coord.device)[index]) * n


def neighbours(
    y: torch.Tensor, x: torch.Tensor, size: Sequence[int], local_ensemble: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """The pixels of a map of size (h, w) around queries at y, x [...], in the order (-,-), (-,+), (+,-), (+,+).

    Without local_ensemble only the nearest one. Returns four lists with an element per pixel: rows [...] and columns
    [...] int64, offsets (y, x) [..., 2] in half pixels, and ensemble weights [...].
    """
    sides, eps = ((-1, 1), 1e-6) if local_ensemble else ((0,), 0)
    rows, cols, offsets, areas = [], [], [], []
    for side_y in sides:
        for side_x in sides:
            row, rel_y = nearest_pixel(y, size[0], side_y, eps)
            col, rel_x = nearest_pixel(x, size[1], side_x, eps)
            rows.append(row)
            cols.append(col)
            offsets.append(torch.stack((rel_y, rel_x), -1))
            areas.append((rel_y * rel_x).abs() + 1e-9)
    total = torch.stack(areas).sum(0)
    weights = [area / total for area in reversed(areas)]  # the area at the opposite corner
    return rows, cols, offsets, weights


def relative_cell(cell: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """[..., 2]: a query's extent in half pixels of the feature map."""
    return torch.stack(
        (cell[..., 0] * size[0], cell[..., 1] * size[1]), -1
    )  # without a tensor of `size`, which CUDA graphs do not allow


def mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
) -> torch.Tensor:
    """Applies Linear layers with an activation between them: x [..., N0], weights[i] [N(i+1), N(i)] -> [..., Nk].

    The other arguments are those of the op mlp.
    """
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(ACTIVATION[activation](x) if i else x, weight, bias)
    return x if add is None else x + add


def local_implicit(
    feat: torch.Tensor,
    coord: torch.Tensor,
    cell: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    feat_unfold: bool = True,
    local_ensemble: bool = True,
    ensemble_after: str = "last",
) -> torch.Tensor:
    """feat [B, C, h, w], coord [B, ..., 2], cell like coord or None -> [B, ..., out_channels]."""
    size = feat.shape[-2:]
    if feat_unfold:
        feat = F.unfold(feat, 3, padding=1).unflatten(2, size)
    feat = feat.permute(0, 2, 3, 1)
    batch = torch.arange(len(feat), dtype=torch.long, device=feat.device).view(-1, *[1] * (coord.dim() - 2))
    tail = [] if cell is None else [relative_cell(cell, size).to(feat.dtype)]
    inputs = [] if ensemble_after == "first" else tail
    out: Any = 0
    for row, col, offset, weight in zip(*neighbours(coord[..., 0], coord[..., 1], size, local_ensemble), strict=True):
        x = torch.cat([feat[batch, row, col], offset.to(feat.dtype), *inputs], -1)
        if ensemble_after == "first":
            pred = F.linear(x, weights[0], biases[0]).relu()
        else:
            pred = mlp(x, weights, biases)
        out = out + pred * weight.unsqueeze(-1).to(torch.promote_types(feat.dtype, torch.float32))
    out = out.to(feat.dtype)
    if ensemble_after == "first":
        out = mlp(torch.cat([out, *tail], -1), weights[1:], biases[1:])
    return out


def decode(
    hoisted: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    cell: torch.Tensor | None,
    position_weight: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    height: int,
    band_start: int,
    local_ensemble: bool,
    ensemble_first: bool,
) -> torch.Tensor:
    """`local_implicit` from the hoisted first layer on: [B, R, S, out_channels]. The arguments are the op's (op.py)."""
    size = (height, hoisted.shape[2])
    dtype = hoisted.dtype
    batch = torch.arange(len(hoisted), dtype=torch.long, device=hoisted.device).view(-1, 1, 1)
    tail = [] if cell is None else [relative_cell(cell, size).to(dtype)]
    inputs = [] if ensemble_first else tail
    out: Any = 0
    for row, col, offset, weight in zip(*neighbours(y, x, size, local_ensemble), strict=True):
        position = torch.cat([offset.to(dtype), *inputs], -1)
        pred = (hoisted[batch, row - band_start, col] + F.linear(position, position_weight)).relu()
        for w, b in [] if ensemble_first else zip(weights[:-1], biases[:-1], strict=True):
            pred = F.linear(pred, w, b).relu()
        out = out + pred * weight.unsqueeze(-1).to(torch.promote_types(dtype, torch.float32))
    out = out.to(dtype)
    if ensemble_first:
        return mlp(torch.cat([out, *tail], -1), weights, biases)
    return F.linear(out, weights[-1], biases[-1])


def decode_texture(
    texture: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    cell: torch.Tensor,
    phase_weight: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    height: int,
    band_start: int,
    local_ensemble: bool,
    ensemble_first: bool = False,
) -> torch.Tensor:
    """LTE's decoder from its maps on: [B, R, S, out_channels]. The arguments are those of the op local_texture (op.py).

    texture [B, rows, w, 4 K]: K coefficients of cosines, K of sines, the K frequencies along y, those along x.
    """
    size = height, texture.shape[2]
    batch = torch.arange(len(texture), dtype=torch.long, device=texture.device).view(-1, 1, 1)
    frequencies = texture.shape[3] // 4
    phase = F.linear(relative_cell(cell, size).to(texture.dtype), phase_weight)
    out: Any = 0
    for row, col, offset, weight in zip(*neighbours(y, x, size, local_ensemble), strict=True):
        values = texture[batch, row - band_start, col]
        coef, freq = values.split(2 * frequencies, -1)
        freq_y, freq_x = freq.chunk(2, -1)
        rel_y, rel_x = offset.to(texture.dtype).unbind(-1)
        angle = math.pi * (freq_y * rel_y.unsqueeze(-1) + freq_x * rel_x.unsqueeze(-1) + phase)
        pred = mlp(coef * torch.cat((angle.cos(), angle.sin()), -1), weights, biases)
        out = out + pred * weight.unsqueeze(-1).to(torch.promote_types(texture.dtype, torch.float32))
    return out.to(texture.dtype)
