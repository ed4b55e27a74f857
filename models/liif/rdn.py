"""RDN without its upsampler: a residual dense network, the larger encoder of LIIF's published models."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..common.convolution import Conv3x3
from .encoder import Encoder


class DenseLayer(nn.Module):
    """[x; ReLU(conv3x3(x))]: [B, C, H, W] -> [B, C + growth, H, W]."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.conv = nn.Sequential(Conv3x3(inputs, growth), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C + growth, H, W]."""
        return torch.cat((x, self.conv(x)), 1)


class DenseBlock(nn.Module):
    """x + conv1x1(dense layers(x)): [B, features, H, W] -> [B, features, H, W]."""

    def __init__(self, features: int, growth: int, convolutions: int):
        super().__init__()
        widths = [features + growth * i for i in range(convolutions + 1)]
        self.convs = nn.Sequential(*(DenseLayer(width, growth) for width in widths[:-1]))
        self.LFF = nn.Conv2d(widths[-1], features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, features, H, W] -> [B, features, H, W]."""
        return x + self.LFF(self.convs(x))


class RDN(Encoder):
    """s = conv3x3(image), features = s + fusion([block_1; ...; block_n]) of dense blocks on conv3x3(s):
    [B, 3, h, w] -> [B, features, h, w].

    The state dict has the keys of LIIF's `rdn` with `no_upsampling`. The defaults are its configuration B.

    Args:
        blocks: dense blocks.
        features: channels between the blocks and of the output.
        growth: channels that each layer of a block adds.
        convolutions: 3 x 3 convolutions in a block.

    Source: Zhang et al., Residual Dense Network for Image Super-Resolution, CVPR 2018.
    """

    def __init__(self, blocks: int = 16, features: int = 64, growth: int = 64, convolutions: int = 8):
        super().__init__()
        self.SFENet1, self.SFENet2 = Conv3x3(3, features), Conv3x3(features, features)
        self.RDBs = nn.ModuleList(DenseBlock(features, growth, convolutions) for _ in range(blocks))
        self.GFF = nn.Sequential(nn.Conv2d(blocks * features, features, 1), Conv3x3(features, features))
        self.out_dim = features
        self.halo = blocks * convolutions + 3  # one pixel per 3 x 3 convolution
        self.live_maps = 4 + 2 * (features + growth * convolutions) // features  # a block's last input and its copy

    @property
    def stages(self) -> list[nn.Module]:
        """The dense blocks."""
        return list(self.RDBs)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] -> [B, features, h, w]."""
        shallow = self.SFENet1(self.checked(image))
        x = self.SFENet2(shallow)
        fuse: Any = self.GFF[0]
        fused = fuse.bias[:, None, None]
        # The 1 x 1 convolution of all blocks' outputs, one at a time: they need not be in memory together.
        for block, weight in zip(self.RDBs, fuse.weight.split(self.out_dim, 1), strict=True):
            x = block(x)
            fused = fused + F.conv2d(x, weight)
        return shallow + self.GFF[1](fused)
