"""The parts of IN² in plain PyTorch, as written without this package's kernels; `IN2(eager=True)` uses them."""

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from inr_kernels.fourier_unit import FFC_BN_ACT, FFCResnetBlock, FourierUnit

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def ffc_resnet_block(block: FFCResnetBlock, x: Pair) -> Pair:
    """An `FFCResnetBlock` in LaMa's order of operations: ([B, C, H, W], [B, D, H, W]) -> the same shapes."""
    out = ffc_bn_act(block.conv2, ffc_bn_act(block.conv1, x))
    return x[0] + out[0], x[1] + out[1]


def ffc_bn_act(layer: FFC_BN_ACT, x: Pair | torch.Tensor) -> Pair:
    """An `FFC_BN_ACT` on (local, global), or on a local part only.

    ([B, C, H, W], [B, D, H, W]) or [B, C, H, W] -> ([B, C', H', W'], [B, D', H', W']).
    """
    ffc, (x_l, x_g) = layer.ffc, x if isinstance(x, tuple) else (x, None)
    out_l, out_g = ffc.convl2l(x_l), ffc.convl2g(x_l)
    if x_g is not None:
        out_l = out_l + ffc.convg2l(x_g)
        out_g = out_g + spectral_transform(ffc.convg2g, x_g)
    return layer.act_l(layer.bn_l(out_l)), layer.act_g(layer.bn_g(out_g))


def spectral_transform(spectral: Any, x: torch.Tensor) -> torch.Tensor:
    """A `SpectralTransform` without a local Fourier unit: [B, C, H, W] -> [B, D, H, W]."""
    x = spectral.conv1(x)
    return spectral.conv2(x + fourier_unit(spectral.fu, x))


def fourier_unit(unit: FourierUnit, x: torch.Tensor) -> torch.Tensor:
    """A `FourierUnit`; the transforms are computed in at least float32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    if torch.onnx.is_in_onnx_export():  # ONNX's standard operators have no complex numbers, and our op needs none
        return unit(x)
    z = torch.fft.rfftn(x.to(exact), dim=(-2, -1), norm="ortho")
    z = torch.stack((z.real, z.imag), 2).flatten(1, 2).to(x.dtype)
    z = unit.bn(unit.conv_layer(z)).relu().to(exact).unflatten(1, (-1, 2))
    z = torch.complex(z[:, :, 0].contiguous(), z[:, :, 1].contiguous())
    z = torch.fft.ifft(z, dim=-2, norm="ortho")
    return torch.fft.irfft(z, n=x.shape[-1], norm="ortho").to(x.dtype)


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: tuple[int, ...],
    rpb: torch.Tensor | None,
) -> torch.Tensor:
    """`inr_kernels.neighborhood_attention_2d` by gathering every query's window, which may be larger than the map.

    query, key, value [B, H, W, heads, dim], rpb [heads, 2 Kh - 1, 2 Kw - 1] -> [B, H, W, heads, dim].
    """
    (rows, step_y, seen_y), (cols, step_x, seen_x) = map(_window, query.shape[1:3], kernel_size, [query.device] * 2)

    def windows(x: torch.Tensor) -> torch.Tensor:  # [B, H, Kh, W, Kw, heads, dim]
        return x[:, rows][:, :, :, cols]

    scores = torch.einsum("byxhd,byixjhd->byxhij", query * query.shape[-1] ** -0.5, windows(key))
    if rpb is not None:
        bias = rpb[:, step_y[:, None, :, None], step_x[None, :, None, :]]  # [heads, H, W, Kh, Kw]
        scores = scores + bias.permute(1, 2, 0, 3, 4).to(scores.dtype)
    scores = scores.masked_fill(~(seen_y[:, None] & seen_x), -math.inf)  # of [Kh, Kw]
    weights = F.softmax(scores.flatten(-2), -1).view_as(scores).to(value.dtype)
    return torch.einsum("byxhij,byixjhd->byxhd", weights, windows(value))


def _window(length: int, kernel_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[length, K] each: the positions that each pixel of an axis sees, and their distances from it, plus K - 1; [K]:
    which of these positions exist.
    """
    pixel, tap = (torch.arange(n, dtype=torch.long, device=device) for n in (length, kernel_size))
    start = torch.minimum(pixel - kernel_size // 2, pixel[-1] + 1 - kernel_size).clamp(min=0)
    seen = start[:, None] + tap
    return seen.minimum(pixel[-1]), seen - pixel[:, None] + kernel_size - 1, tap <= pixel[-1]
