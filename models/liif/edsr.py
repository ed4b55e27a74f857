"""EDSR without its upsampler: the encoder that maps an image to features of the same size."""

import torch
from torch import nn

from inr_kernels._core.hooks import is_untouched

from ..common.convolution import Conv3x3
from .encoder import Encoder


class MeanShift(nn.Conv2d):
    """Adds `sign` times the mean colour of DIV2K: [B, 3, H, W] -> [B, 3, H, W].

    LIIF's checkpoints hold two, which its forward does not call.
    """

    def __init__(self, sign: int):
        super().__init__(3, 3, 1)
        self.requires_grad_(False)
        nn.init.dirac_(self.weight)
        assert self.bias is not None
        self.bias.copy_(sign * self.bias.new_tensor([0.4488, 0.4371, 0.4040]))


class ResBlock(nn.Module):
    """x + res_scale conv3x3(ReLU(conv3x3(x)))."""

    def __init__(self, features: int, res_scale: float):
        super().__init__()
        self.body = nn.Sequential(Conv3x3(features, features), nn.ReLU(), Conv3x3(features, features))
        self.res_scale = res_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        fuses = is_untouched(self.body, *self.body) and [type(layer) for layer in self.body] == _LAYERS
        if not (fuses and self.res_scale == 1):
            return torch.add(x, self.body(x), alpha=self.res_scale)
        first, _, last = self.body
        return last(first(x, relu=True), add=x)


_LAYERS = [Conv3x3, nn.ReLU, Conv3x3]


class EDSR(Encoder):
    """x = head(image), features = x + body(x): [B, 3, h, w] -> [B, features, h, w].

    The state dict has the keys of LIIF's `edsr-baseline` (16 blocks of 64 features) with
    `no_upsampling`, including the unused mean shifts.

    Args:
        blocks: residual blocks, each conv3x3, ReLU, conv3x3.
        features: channels of every layer.
        res_scale: factor on a block's residual.

    Source: Lim et al., Enhanced Deep Residual Networks for Single Image Super-Resolution, CVPRW 2017.
    """

    def __init__(self, blocks: int = 16, features: int = 64, res_scale: float = 1.0):
        super().__init__()
        self.sub_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.head = nn.Sequential(Conv3x3(3, features))
        body = [ResBlock(features, res_scale) for _ in range(blocks)]
        self.body = nn.Sequential(*body, Conv3x3(features, features))
        self.out_dim = features
        self.halo = 2 * blocks + 2  # one pixel per convolution
        self.live_maps = 4  # in a residual block, convolution buffers included

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] -> [B, features, h, w]."""
        x = self.head(self.checked(image))
        return x + self.body(x)

    @property
    def stages(self) -> list[nn.Module]:
        """The residual blocks and the last convolution."""
        return list(self.body)
