"""The Fourier unit, and the convolutions of its layer, in plain PyTorch: the definition, differentiable any number of
times.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .arguments import TRANSPOSED, compute_dtype


def fourier_unit(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    training: bool,
    eps: float,
    groups: int,
    norm: str,
    dft: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [B, C, H, W], weight [2 O, 2 C / groups], scale, shift [2 O] -> [B, O, H, W], mean [2 O], variance [2 O].

    LaMa's order of operations. The arguments are the op's (op.py); mean and variance are the batch statistics used in
    training, else empty. dft: transform by matrix products instead of FFTs.
    """
    image, size = x.to(compute_dtype(x.dtype)), x.shape[2:]
    # torch refuses an FFT of an empty tensor, and ONNX's standard operators have no complex numbers.
    dft = dft or torch.onnx.is_in_onnx_export() or not len(x)
    z = dft_spectrum(image, norm) if dft else fft_spectrum(image, norm)
    z = F.conv2d(z, weight[:, :, None, None], groups=groups)
    mean = var = z.new_empty(0)
    if training:
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        z = (z - mean.view(-1, 1, 1)) * torch.rsqrt(var + eps).view(-1, 1, 1)
    z = torch.relu(z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    y = dft_image(z, size, norm) if dft else fft_image(z, size, norm)
    return y.to(x.dtype), mean, var


def transform(x: torch.Tensor, norm: str) -> torch.Tensor:
    """The complex half spectrum [B, C, H, W // 2 + 1] of x [B, C, H, W]."""
    return torch.fft.rfftn(x, dim=(-2, -1), norm=norm)


def fft_spectrum(x: torch.Tensor, norm: str) -> torch.Tensor:
    """x [B, C, H, W] -> [B, 2 C, H, W // 2 + 1]: real and imaginary parts of the channels, interleaved."""
    z = transform(x, norm)
    return torch.stack((z.real, z.imag), 2).flatten(1, 2)


def fft_image(z: torch.Tensor, size: Sequence[int], norm: str) -> torch.Tensor:
    """The inverse of `fft_spectrum` for a spectrum that need not be Hermitian."""
    z = z.unflatten(1, (-1, 2))
    return inverse(torch.complex(z[:, :, 0], z[:, :, 1]), size, norm)


def inverse(z: torch.Tensor, size: Sequence[int], norm: str) -> torch.Tensor:
    """Computes numpy.fft.irfft2 of a complex half spectrum on every device: z [B, C, H, W // 2 + 1] -> [B, C, H, W].

    The first column and, for an even width, the last are their own conjugate mirrors: after the transform of the
    columns their imaginary parts are ignored. Not every library's 2-D transform does so.
    """
    if z.device.type == "cpu":
        return torch.fft.irfftn(z, s=size, dim=(-2, -1), norm=norm)
    z = torch.fft.ifft(z, dim=-2, norm=norm)
    column = torch.arange(z.shape[-1], dtype=torch.long, device=z.device)
    own_mirror = (column == 0) | (2 * column == size[1])
    return torch.fft.irfft(torch.where(own_mirror, z.real + 0j, z), n=size[1], dim=-1, norm=norm)


def product(z: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None, relu: bool, groups: int) -> torch.Tensor:
    """The product on a complex spectrum, `Steps.product`: z [B, C, H, W'] -> [B, O, H, W'].

    weight [2 O, 2 C / groups] multiplies real and imaginary parts; shift [2 O] or None is added; then the ReLU.
    """
    parts = torch.stack((z.real, z.imag), 2).flatten(1, 2)
    out = F.conv2d(parts, weight[:, :, None, None], shift, groups=groups)
    out = (out.relu() if relu else out).unflatten(1, (-1, 2))
    return torch.complex(out[:, :, 0], out[:, :, 1])


def dft_factors(n: int, columns: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, columns]: cos and sin of 2 pi j k / n for j < n, k < columns; j k is reduced modulo n before rounding."""
    j, k = (torch.arange(m, dtype=torch.long, device=like.device) for m in (n, columns))
    count = torch.full((1,), n, dtype=torch.long, device=like.device)  # a tensor: n may be open in an exported graph
    angle = (j[:, None] * k % count).double() * (2 * math.pi / count.double())
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def norm_factor(count: int, norm: str, back: bool) -> float:
    """The factor of a transform of `count` values, or (back) of its inverse."""
    return {"ortho": count**-0.5, "backward": 1 / count if back else 1.0, "forward": 1.0 if back else 1 / count}[norm]


def dft_spectrum(x: torch.Tensor, norm: str) -> torch.Tensor:
    """`fft_spectrum` by matrix products."""
    height, width = x.shape[2:]
    cos, sin = dft_factors(width, width // 2 + 1, x)
    re, im = x @ (cos * norm_factor(height * width, norm, False)), x @ (sin * -norm_factor(height * width, norm, False))
    cos, sin = dft_factors(height, height, x)
    return torch.stack((cos @ re + sin @ im, cos @ im - sin @ re), 2).flatten(1, 2)


def dft_image(z: torch.Tensor, size: Sequence[int], norm: str) -> torch.Tensor:
    """`fft_image` by matrix products."""
    height, width = size
    z = z.unflatten(1, (-1, 2))
    re, im = z[:, :, 0], z[:, :, 1]
    cos, sin = dft_factors(height, height, z)
    re, im = cos @ re - sin @ im, cos @ im + sin @ re
    cos, sin = dft_factors(width, width // 2 + 1, z)
    column = torch.arange(width // 2 + 1, dtype=torch.long, device=z.device)
    own_mirror = (column == 0) | (2 * column == width)  # the others' conjugate mirrors are not stored
    times = torch.where(own_mirror, 1, 2).to(z.dtype) * norm_factor(height * width, norm, True)
    return re @ (cos * times).T - im @ (sin * times).T


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    add: torch.Tensor | None,
    relu: bool,
    padding: str,
) -> torch.Tensor:
    """x [B, C, H, W], other [B, D, H, W] or None, weight [O, C + D, 3, 3] -> conv (+ bias) (+ add), or its ReLU."""
    out = F.conv2d(pad(x, other, padding), weight)
    return finish(fold(out) if padding == TRANSPOSED else out, bias, add, relu)


def finish(out: torch.Tensor, bias: torch.Tensor | None, add: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """out (+ bias) (+ add), or its ReLU."""
    out = out if bias is None else out + bias.view(-1, 1, 1)
    out = out if add is None else out + add
    return out.relu() if relu else out


def pad(x: torch.Tensor, other: torch.Tensor | None, padding: str) -> torch.Tensor:
    """Concatenates both inputs' channels, and pads a pixel on every side, or two zeros if padding is TRANSPOSED."""
    x = x if other is None else torch.cat((x, other), 1)
    return (
        F.pad(x, (1, 1, 1, 1), mode="reflect") if padding == "reflect" else F.pad(x, [1 + (padding == TRANSPOSED)] * 4)
    )


def fold(out: torch.Tensor) -> torch.Tensor:
    """[B, C, H + 2, W + 2] -> [B, C, H, W]: adds the border to the inside, the transpose of padding by reflection."""
    for dim in (2, 3):
        size = out.shape[dim] - 2
        inside = out.narrow(dim, 1, size).clone()
        inside.narrow(dim, 1, 1).add_(out.narrow(dim, 0, 1))
        inside.narrow(dim, size - 2, 1).add_(out.narrow(dim, size + 1, 1))
        out = inside
    return out


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
    transposed: bool,
    output_padding: Sequence[int],
) -> torch.Tensor:
    """scale conv(x) (+ bias) (+ add), or its ReLU; x [B, C, H, W] -> [B, O, H', W']."""
    stride, padding = tuple(stride), tuple(padding)
    if transposed:
        out = F.conv_transpose2d(x, weight, None, stride, padding, tuple(output_padding))
    else:
        if padding_mode == "reflect":
            x, padding = F.pad(x, sides(padding), mode="reflect"), (0, 0)
        out = F.conv2d(x, weight, None, stride, padding)
    return finish(out if scale is None else out * scale.view(-1, 1, 1), bias, add, relu)


def sides(padding: Sequence[int]) -> list[int]:
    """(vertical, horizontal) padding as F.pad takes it: left, right, top, bottom."""
    return [padding[1], padding[1], padding[0], padding[0]]
