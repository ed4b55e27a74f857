"""LaMa's layers as its code defines them, and similar layers that compute something else."""

import torch
import torch.nn.functional as F
from torch import nn


class FourierUnit(nn.Module):
    def __init__(self, inputs, outputs, groups=1, spatial_scale_factor=None, fft_norm="ortho"):
        super().__init__()
        self.groups, self.fft_norm, self.spatial_scale_factor = groups, fft_norm, spatial_scale_factor
        self.spatial_scale_mode, self.spectral_pos_encoding, self.use_se, self.ffc3d = "bilinear", False, False, False
        self.conv_layer = nn.Conv2d(2 * inputs, 2 * outputs, 1, groups=groups, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(2 * outputs), nn.ReLU(inplace=True)

    def forward(self, x):
        size = x.shape[2:]
        if self.spatial_scale_factor is not None:
            x = F.interpolate(x, scale_factor=self.spatial_scale_factor, mode=self.spatial_scale_mode)
        z = torch.fft.rfftn(x, dim=(2, 3), norm=self.fft_norm)
        z = torch.view_as_real(z).permute(0, 1, 4, 2, 3).flatten(1, 2)
        z = self.relu(self.bn(self.conv_layer(z))).unflatten(1, (-1, 2))
        y = torch.fft.irfftn(torch.complex(z[:, :, 0], z[:, :, 1]), s=x.shape[2:], dim=(2, 3), norm=self.fft_norm)
        return y if self.spatial_scale_factor is None else F.interpolate(y, size=size, mode=self.spatial_scale_mode)


class SpectralTransform(nn.Module):
    def __init__(self, inputs, outputs, stride, unit, **options):
        super().__init__()
        half = outputs // 2
        self.enable_lfu, self.stride = False, stride
        self.downsample = nn.AvgPool2d(2, 2) if stride == 2 else nn.Identity()
        self.conv1 = nn.Sequential(nn.Conv2d(inputs, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True))
        self.fu, self.conv2 = unit(half, half, **options), nn.Conv2d(half, outputs, 1, bias=False)

    def forward(self, x):
        x = self.conv1(self.downsample(x))
        return self.conv2(x + self.fu(x))


class FFC(nn.Module):
    def __init__(self, inputs, outputs, ratio_gin, ratio_gout, stride, unit, **options):
        super().__init__()
        in_g, out_g = int(inputs * ratio_gin), int(outputs * ratio_gout)
        in_l, out_l = inputs - in_g, outputs - out_g
        self.ratio_gin, self.ratio_gout, self.global_in_num, self.gated = ratio_gin, ratio_gout, in_g, False

        def conv(a, b):
            return nn.Conv2d(a, b, 3, stride, 1, bias=False, padding_mode="reflect") if a and b else nn.Identity()

        self.convl2l, self.convl2g, self.convg2l = conv(in_l, out_l), conv(in_l, out_g), conv(in_g, out_l)
        self.convg2g = SpectralTransform(in_g, out_g, stride, unit, **options) if in_g and out_g else nn.Identity()
        self.gate = nn.Identity()

    def forward(self, x):
        x_l, x_g = x if isinstance(x, tuple) else (x, torch.tensor(0))  # an absent part, in LaMa's later versions
        out_l = self.convl2l(x_l) + self.convg2l(x_g) if self.ratio_gout != 1 else torch.tensor(0)
        out_g = self.convl2g(x_l) + self.convg2g(x_g) if self.ratio_gout != 0 else torch.tensor(0)
        return out_l, out_g


class FFC_BN_ACT(nn.Module):
    def __init__(self, inputs, outputs, ratio_gin, ratio_gout, stride=1, unit=FourierUnit, **options):
        super().__init__()
        self.ffc, out_g = (
            FFC(inputs, outputs, ratio_gin, ratio_gout, stride, unit, **options),
            int(outputs * ratio_gout),
        )
        self.bn_l = nn.BatchNorm2d(outputs - out_g) if outputs - out_g else nn.Identity()
        self.bn_g = nn.BatchNorm2d(out_g) if out_g else nn.Identity()
        self.act_l, self.act_g = nn.ReLU(inplace=True), nn.ReLU(inplace=True) if out_g else nn.Identity()

    def forward(self, x):
        x_l, x_g = self.ffc(x)
        return self.act_l(self.bn_l(x_l)), self.act_g(self.bn_g(x_g))


class FFCResnetBlock(nn.Module):
    def __init__(self, channels, **options):
        super().__init__()
        self.conv1 = FFC_BN_ACT(channels, channels, 0.75, 0.75, **options)
        self.conv2 = FFC_BN_ACT(channels, channels, 0.75, 0.75, **options)

    def forward(self, x):
        return tuple(a + b for a, b in zip(x, self.conv2(self.conv1(x)), strict=True))


class Generator(nn.Sequential):
    """One layer down, two blocks."""

    def __init__(self, **options):
        down = FFC_BN_ACT(4, 16, 0, 0.75, stride=2, **options)
        super().__init__(down, FFCResnetBlock(16, **options), FFCResnetBlock(16, **options))


class ConcatTupleLayer(nn.Module):
    def forward(self, x):
        return torch.cat(x, 1)


def whole_generator():
    """As LaMa's generator's `model`, with one layer down, one block and one layer up."""
    layers = [nn.ReflectionPad2d(1), FFC_BN_ACT(4, 8, 0, 0), FFC_BN_ACT(8, 16, 0, 0.75, stride=2), FFCResnetBlock(16)]
    layers += [ConcatTupleLayer(), nn.ConvTranspose2d(16, 8, 3, 2, 1, 1), nn.BatchNorm2d(8), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(8, 3, 7), nn.Sigmoid())


class Leaky(FourierUnit):
    """Another activation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.relu = nn.LeakyReLU()


class Shifted(FourierUnit):
    """Adds one to the output."""

    def forward(self, x):
        return super().forward(x) + 1


class Encoding(FourierUnit):
    """Encodes positions in additional channels."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spectral_pos_encoding = True


class Failing(FourierUnit):
    """A forward that does not run on a CPU."""

    def forward(self, x):
        raise RuntimeError("no GPU here")


# Units that must not be accelerated, and the logged reason.
DIFFERENT = {
    Leaky: "its layers are not Conv2d, BatchNorm2d and ReLU",
    Shifted: "its results differ on random inputs in evaluation",
    Encoding: "it encodes positions, transforms the channels too or uses squeeze-and-excitation",
    Failing: "it does not run alone, on random inputs on a CPU",
}
