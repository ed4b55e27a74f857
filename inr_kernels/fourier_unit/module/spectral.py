"""The modules of the global part: FourierUnit, SpectralTransform."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core.checks import require, require_input
from inr_kernels._core.hooks import is_untouched

from ..functional import fourier_unit, through_spectrum
from .folding import affine, folded_bias, folds, is_pointwise
from .fused import folded_weight, is_small


class FourierUnit(nn.Module):
    """Applies `fourier_unit`: y = irfft2(relu(bn(conv1x1(rfft2(x))))).

    The formula in full, dtypes and errors are those of the function.

    Args:
        in_channels, out_channels: channels of x and y; the convolution on the spectrum has twice as many.
        groups: of that convolution.
        spatial_scale_factor, spatial_scale_mode: resize x before, and y back to x's size after, by F.interpolate.
        fft_norm: "ortho", "backward" or "forward".
        spectral_pos_encoding, use_se, se_kwargs, ffc3d: must stay off; LaMa's experiments, which none of its published
            models uses.

    Example:
        >>> FourierUnit(4, 6)(torch.randn(1, 4, 5, 7)).shape
        torch.Size([1, 6, 5, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 1,
        spatial_scale_factor: float | None = None,
        spatial_scale_mode: str = "bilinear",
        spectral_pos_encoding: bool = False,
        use_se: bool = False,
        se_kwargs: dict[str, Any] | None = None,
        ffc3d: bool = False,
        fft_norm: str = "ortho",
    ):
        super().__init__()
        if spectral_pos_encoding or use_se or ffc3d:
            on = {"spectral_pos_encoding": spectral_pos_encoding, "use_se": use_se, "ffc3d": ffc3d}
            raise ValueError(f"spectral_pos_encoding, use_se and ffc3d must be off; got {on}")
        self.groups = groups
        self.conv_layer = nn.Conv2d(2 * in_channels, 2 * out_channels, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(2 * out_channels)
        self.spatial_scale_factor, self.spatial_scale_mode = spatial_scale_factor, spatial_scale_mode
        self.fft_norm = fft_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, H, W]."""
        if self.spatial_scale_factor is None:
            return _unit(self, x)
        small = _resize(x, self.spatial_scale_mode, scale_factor=self.spatial_scale_factor)
        return _resize(_unit(self, small), self.spatial_scale_mode, size=x.shape[2:])


class SpectralTransform(nn.Module):
    """Computes conv2(x' + fu(x') + lfu(x')), x' = relu(bn(conv1(x))): the global part of a fast Fourier convolution.

    Args:
        in_channels, out_channels: channels of x and of the output; x' has out_channels // 2.
        stride: 1, or 2, which first averages 2 x 2 pixels.
        groups: of both convolutions and of the units.
        enable_lfu: whether a second unit transforms the four quarters of the map, which then must be square and even.
        fu_kwargs: options of `FourierUnit`.

    Example:
        >>> SpectralTransform(4, 8, enable_lfu=False)(torch.randn(1, 4, 5, 7)).shape
        torch.Size([1, 8, 5, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 1,
        enable_lfu: bool = True,
        **fu_kwargs: Any,
    ):
        super().__init__()
        half = out_channels // 2
        self.enable_lfu, self.stride = enable_lfu, stride
        self.downsample = nn.AvgPool2d(2, 2) if stride == 2 else nn.Identity()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, half, 1, groups=groups, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True)
        )
        self.fu = FourierUnit(half, half, groups, **fu_kwargs)
        if enable_lfu:
            self.lfu = FourierUnit(half, half, groups)
        self.conv2 = nn.Conv2d(half, out_channels, 1, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, H / stride, W / stride]."""
        return spectral(self, x)


def _unit(unit, x):
    """Computes a FourierUnit without resizing."""
    conv, bn = unit.conv_layer, unit.bn
    fits = is_pointwise(conv) and type(bn) is nn.BatchNorm2d and bn.affine and is_untouched(bn)
    if fits:
        require_input(x, "x", conv.in_channels // 2, conv.weight, any_dtype=True)
    if not fits or (is_small(x, unit) and conv.weight.dtype.itemsize > 2):  # half precision is computed in float32
        return through_spectrum(x, lambda z: bn(conv(z.to(getattr(conv, "weight", z).dtype))).relu(), unit.fft_norm)
    training = bn.training or bn.running_mean is None
    return fourier_unit(
        x,
        conv.weight,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        training=training,
        momentum=_momentum(bn) if training else 0.0,
        eps=bn.eps,
        groups=unit.groups,
        norm=unit.fft_norm,
    )


def _resize(x, mode, **to):
    return F.interpolate(x, mode=mode, align_corners=False, **to)


def _momentum(bn):
    """The momentum of a batch norm's next update; counts the update, as the norm does."""
    if bn.num_batches_tracked is None:
        return 0.0 if bn.momentum is None else bn.momentum
    bn.num_batches_tracked.add_(1)
    return 1.0 / bn.num_batches_tracked if bn.momentum is None else bn.momentum


def spectral(transform: Any, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Computes a SpectralTransform, its output multiplied by scale [O], which is folded into the last convolution."""
    x = _first_layers(transform.conv1, transform.downsample(x))
    out = x + transform.fu(x)
    if transform.enable_lfu:
        out = out + _quarters(transform.lfu, x)
    last = transform.conv2
    if scale is None or not is_pointwise(last):
        out = last(out)
        return out if scale is None else out * scale.to(out.dtype).view(-1, 1, 1)
    return F.conv2d(out, folded_weight([last], out, scale), groups=last.groups)


def _first_layers(layers, x):
    """Computes conv1 of a SpectralTransform, with the norm folded into the convolution where possible."""
    parts = tuple(layers) if type(layers) is nn.Sequential and is_untouched(layers) else ()
    if [type(part) for part in parts] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
        return layers(x)
    if is_small(x, *parts) or not (is_pointwise(parts[0]) and folds(*parts[1:])):
        return layers(x)
    conv, norm, _ = parts
    coefficients = affine(norm)
    weight = folded_weight([conv], x, coefficients and coefficients[0])
    return F.conv2d(x, weight, folded_bias(None, coefficients, weight.dtype), groups=conv.groups).relu_()


def _quarters(lfu, x):
    """Applies a unit to the four quarters of a map, stacked as channels, and repeats the result over the map."""
    height, width = x.shape[2:]
    even = height == width and height % 2 == 0
    require(even, "x's sides divided by the stride", "be equal and even for enable_lfu", [height, width])
    parts = x[:, : x.shape[1] // 4]
    for dim in (2, 3):
        parts = torch.cat(parts.split(height // 2, dim), 1)
    return lfu(parts).repeat(1, 1, 2, 2)
