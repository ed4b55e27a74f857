"""EDSR without its upsampler: the encoder that maps an image to features of the same size."""

import math

import torch
from torch import nn

from ..common.progress import Progress, reporting
from ..common.tiling import map_tiles, pixels_with_halo

# Feature maps of a tile in memory at once in a residual block, convolution buffers included.
LIVE_MAPS = 4


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Returns a 3 x 3 convolution that keeps the size: [B, inputs, H, W] -> [B, outputs, H, W]."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class MeanShift(nn.Conv2d):
    """Adds `sign` times the mean colour of DIV2K: [B, 3, H, W] -> [B, 3, H, W].

    LIIF's checkpoints hold two, which its forward does not call.
    """

    def __init__(self, sign: int):
        super().__init__(3, 3, 1)
        self.requires_grad_(False)
        self.weight.copy_(torch.eye(3)[:, :, None, None])
        assert self.bias is not None
        self.bias.copy_(sign * torch.tensor([0.4488, 0.4371, 0.4040]))


class ResBlock(nn.Module):
    """x + res_scale conv3x3(ReLU(conv3x3(x)))."""

    def __init__(self, features: int, res_scale: float):
        super().__init__()
        self.body = nn.Sequential(conv(features, features), nn.ReLU(), conv(features, features))
        self.res_scale = res_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return torch.add(x, self.body(x), alpha=self.res_scale)


class EDSR(nn.Module):
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
        self.head = nn.Sequential(conv(3, features))
        body = [ResBlock(features, res_scale) for _ in range(blocks)]
        self.body = nn.Sequential(*body, conv(features, features))
        self.out_dim = features
        self.halo = 2 * blocks + 2  # receptive field to each side: one pixel per convolution

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] -> [B, features, h, w]."""
        x = self.head(image.contiguous(memory_format=torch.channels_last))
        return x + self.body(x)

    def tiled(self, image: torch.Tensor, workspace: int, progress: Progress = None) -> torch.Tensor:
        """As `forward`, exact for any size, on tiles that overlap by the receptive field.

        Args:
            image: [B, 3, h, w].
            workspace: bytes of working memory in addition to the features, approximately; a tile is never smaller
                than its overlap.
            progress: called as progress(done, total) after each tile, or after each block if there is one tile only.
        """
        side = self._tile_side(image, workspace)
        if side is None:
            with reporting(list(self.body), progress):
                return self(image)
        return map_tiles(self, image, side=side, halo=self.halo, progress=progress)

    def tiled_pixels(self, image: torch.Tensor, workspace: int) -> int:
        """The pixels that `tiled` computes, overlaps included, for an image [B, 3, h, w]."""
        side = self._tile_side(image, workspace)
        height, width = image.shape[2:]
        return len(image) * (height * width if side is None else pixels_with_halo((height, width), side, self.halo))

    def _tile_side(self, image: torch.Tensor, workspace: int) -> int | None:
        """None: the whole image at once."""
        pixel = LIVE_MAPS * self.out_dim * image.element_size() * max(1, len(image))
        side = max(math.isqrt(workspace // pixel) - 2 * self.halo, 2 * self.halo)
        return None if max(image.shape[2:]) <= side + 2 * self.halo else side
