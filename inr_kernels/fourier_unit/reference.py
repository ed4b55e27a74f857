"""The Fourier unit, and the convolution beside it, in plain PyTorch: the mathematics, any order of derivatives."""

import math

import torch
import torch.nn.functional as F

from .arguments import compute_dtype


def fourier_unit(x, weight, scale, shift, training, eps, groups, norm, dft=False):
    """x [B, C, H, W], weight [2 O, 2 C / groups], scale, shift [2 O] -> [B, O, H, W], mean [2 O], variance [2 O].

    LaMa's order of operations. The arguments are those of the op (op.py); the last two results are the statistics that
    training normalized with, empty otherwise. dft: by matrix products instead of FFTs.
    """
    image, size = x.to(compute_dtype(x.dtype)), x.shape[2:]
    dft = dft or not len(x)  # an FFT of nothing is refused
    z = dft_spectrum(image, norm) if dft else fft_spectrum(image, norm)
    z = F.conv2d(z, weight[:, :, None, None], groups=groups)
    mean = var = z.new_empty(0)
    if training:
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        z = (z - mean.view(-1, 1, 1)) * torch.rsqrt(var + eps).view(-1, 1, 1)
    z = torch.relu(z * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    y = dft_image(z, size, norm) if dft else fft_image(z, size, norm)
    return y.to(x.dtype), mean, var


def fft_spectrum(x, norm):
    """x [B, C, H, W] -> [B, 2 C, H, W // 2 + 1]: the real and the imaginary part of each channel, in turn."""
    z = torch.fft.rfftn(x, dim=(-2, -1), norm=norm)
    return torch.stack((z.real, z.imag), 2).flatten(1, 2)


def fft_image(z, size, norm):
    """The inverse of `fft_spectrum` for a spectrum that need not be Hermitian."""
    z = z.unflatten(1, (-1, 2))
    return inverse(torch.complex(z[:, :, 0], z[:, :, 1]), size, norm)


def inverse(z, size, norm):
    """numpy.fft.irfft2 of a complex spectrum, on every device.

    The first and, at an even width, the last column stand for themselves alone, so that after the transform of the
    columns their imaginary parts count for nothing. Not every library's transform of two dimensions says so.
    """
    if z.device.type == "cpu":
        return torch.fft.irfftn(z, s=size, dim=(-2, -1), norm=norm)
    z = torch.fft.ifft(z, dim=-2, norm=norm)
    column = torch.arange(z.shape[-1], device=z.device)
    alone = (column == 0) | (2 * column == size[1])
    return torch.fft.irfft(torch.where(alone, z.real + 0j, z), n=size[1], dim=-1, norm=norm)


def dft_factors(n, columns, like):
    """cos and sin of 2 pi j k / n for j < n, k < columns; angles reduced before they are rounded."""
    j, k = (torch.arange(m, device=like.device) for m in (n, columns))
    angle = (j[:, None] * k % n).double() * (2 * math.pi / n)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def norm_factor(count, norm, back):
    """What a transform of `count` values is multiplied with."""
    return {"ortho": count**-0.5, "backward": 1 / count if back else 1.0, "forward": 1.0 if back else 1 / count}[norm]


def dft_spectrum(x, norm):
    """`fft_spectrum` by products with the factors."""
    height, width = x.shape[2:]
    cos, sin = dft_factors(width, width // 2 + 1, x)
    re, im = x @ (cos * norm_factor(height * width, norm, False)), x @ (sin * -norm_factor(height * width, norm, False))
    cos, sin = dft_factors(height, height, x)
    return torch.stack((cos @ re + sin @ im, cos @ im - sin @ re), 2).flatten(1, 2)


def dft_image(z, size, norm):
    """`fft_image` by products with the factors."""
    height, width = size
    z = z.unflatten(1, (-1, 2))
    re, im = z[:, :, 0], z[:, :, 1]
    cos, sin = dft_factors(height, height, z)
    re, im = cos @ re - sin @ im, cos @ im + sin @ re
    cos, sin = dft_factors(width, width // 2 + 1, z)
    column = torch.arange(width // 2 + 1, device=z.device)
    alone = (column == 0) | (2 * column == width)
    times = torch.where(alone, 1, 2).to(z.dtype) * norm_factor(height * width, norm, True)
    return re @ (cos * times).T - im @ (sin * times).T


def conv3x3(x, weight, bias, other, add, relu, padding):
    """x [B, C, H, W], other [B, D, H, W] or None, weight [O, C + D, 3, 3] -> conv (+ bias) (+ add), or its ReLU."""
    out = F.conv2d(pad(x, other, padding), weight, bias)
    out = out if add is None else out + add
    return out.relu() if relu else out


def pad(x, other, padding):
    """Both inputs' channels, one pixel larger on every side."""
    x = x if other is None else torch.cat((x, other), 1)
    return F.pad(x, (1, 1, 1, 1), mode="constant" if padding == "zeros" else padding)
