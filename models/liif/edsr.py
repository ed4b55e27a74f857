"""EDSR without its upsampler: the encoder that maps a picture to features of the same size."""

import math

import torch
from torch import nn

# How many feature maps of a tile are alive at once in a residual block, convolution buffers included.
LIVE_MAPS = 4


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class MeanShift(nn.Conv2d):
    """Adds `sign` times the mean of DIV2K; LIIF's checkpoints hold two, its forward calls neither."""

    def __init__(self, sign):
        super().__init__(3, 3, 1)
        self.requires_grad_(False)
        self.weight.copy_(torch.eye(3)[:, :, None, None])
        self.bias.copy_(sign * torch.tensor([0.4488, 0.4371, 0.4040]))


class ResBlock(nn.Module):
    def __init__(self, features, res_scale):
        super().__init__()
        self.body = nn.Sequential(conv(features, features), nn.ReLU(), conv(features, features))
        self.res_scale = res_scale

    def forward(self, x):
        return torch.add(x, self.body(x), alpha=self.res_scale)


class EDSR(nn.Module):
    """x = head(picture), features = x + body(x): [B, 3, h, w] -> [B, features, h, w].

    The state dict has the keys of LIIF's `edsr-baseline` (16 blocks of 64 features) with
    `no_upsampling`, the unused mean shifts included.

    Args:
        blocks: residual blocks, each conv3x3, ReLU, conv3x3.
        features: channels of every layer.
        res_scale: factor on a block's residual.

    Source: Lim et al., Enhanced Deep Residual Networks for Single Image Super-Resolution, CVPRW 2017.
    """

    def __init__(self, blocks=16, features=64, res_scale=1.0):
        super().__init__()
        self.sub_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.head = nn.Sequential(conv(3, features))
        body = [ResBlock(features, res_scale) for _ in range(blocks)]
        self.body = nn.Sequential(*body, conv(features, features))
        self.out_dim = features
        self.halo = 2 * blocks + 2  # pixels that a feature sees to each side: one per convolution

    def forward(self, picture):
        x = self.head(picture.contiguous(memory_format=torch.channels_last))
        return x + self.body(x)

    def tiled(self, picture, workspace):
        """forward() on tiles that overlap by the receptive field: as exact, for any size.

        Beside the features it needs about `workspace` bytes, but never tiles smaller than the overlap.
        """
        height, width = picture.shape[2:]
        pixel = LIVE_MAPS * self.out_dim * picture.element_size() * len(picture)
        side = max(math.isqrt(workspace // pixel) - 2 * self.halo, 2 * self.halo)
        if max(height, width) <= side + 2 * self.halo:
            return self(picture)
        out = torch.empty(
            (len(picture), self.out_dim, height, width),
            dtype=picture.dtype,
            device=picture.device,
            memory_format=torch.channels_last,
        )
        for top in range(0, height, side):
            for left in range(0, width, side):
                y, x = max(top - self.halo, 0), max(left - self.halo, 0)
                bottom, right = top + side, left + side
                tile = self(picture[..., y : bottom + self.halo, x : right + self.halo])
                out[..., top:bottom, left:right] = tile[..., top - y : bottom - y, left - x : right - x]
        return out
