"""DEAR's encoder and upsampling layers, the smooth fill of missing pixels, and the initialization."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

STRIDE = 4  # pixels of the image per pixel of the latent
OPEN_LEVELS = 13  # of the pyramid of `smooth_fill` where the size is open: it has one pixel for sides up to 8192
REACH = 2  # padding of the dilated convolution; reflection needs a latent with longer sides


class InstanceNorm(nn.Module):
    """Normalizes every channel of every image to mean 0 and variance 1; a single pixel becomes 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return torch.group_norm(x, x.shape[1])


class ResBlock(nn.Module):
    """x + conv3x3(ReLU(conv3x3(x, dilation 2))), with a norm after each convolution unless norm is "none"."""

    def __init__(self, channels: int, norm: str):
        super().__init__()

        def conv(dilation: int) -> list[nn.Module]:
            options: dict[str, Any] = {"dilation": dilation, "padding": dilation, "padding_mode": "reflect"}
            layer = nn.Conv2d(channels, channels, 3, bias=norm == "none", **options)
            return [layer] if norm == "none" else [layer, InstanceNorm()]

        self.norm = norm
        self.body = nn.Sequential(*conv(REACH), nn.ReLU(), *conv(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return x + self.body(x)


class Encoder(nn.Sequential):
    """[masked image, mask] [B, 4, 4 h, 4 w] -> [B, channels, h, w]: three convolutions, then ResNet blocks."""

    def __init__(self, channels: int, blocks: int, norm: str):
        super().__init__(
            nn.Conv2d(4, channels // 4, 7, padding=3, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 4, stride=2, padding=1),
            nn.ReLU(),
            *(ResBlock(channels, norm) for _ in range(blocks)),
        )


def enlarge(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """[B, inputs, h, w] -> [B, outputs, 4 h, 4 w]: two transposed convolutions."""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, hidden, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(hidden, outputs, 4, stride=2, padding=1),
    )


def encoder_input(seen: torch.Tensor, mask: torch.Tensor, shortest: int, mode: str) -> torch.Tensor:
    """Returns [image; M] [B, 4, H', W'], padded with missing pixels to the sides that the encoder takes.

    Args:
        seen: the image [B, 3, H, W].
        mask: M [B, 1, H, W].
        shortest: the minimum side of the latent.
        mode: F.pad's, for the image.
    """
    right, below = (max(-n % STRIDE, shortest * STRIDE - n) for n in (mask.shape[3], mask.shape[2]))
    sides = (0, right, 0, below)
    both = torch.cat([F.pad(seen, sides, mode), F.pad(mask, sides, value=1)], 1)
    return both.contiguous(memory_format=torch.channels_last)


def smooth_fill(known: torch.Tensor, mask: torch.Tensor, sweeps: int = 4) -> torch.Tensor:
    """Fills the missing pixels of I (1 - M) [B, 3, H, W] from their surroundings: approximately the harmonic function.

    It averages the known pixels down a pyramid, and goes up again: on each level the missing pixels start from the
    coarser level and are then relaxed to the mean of their 3 x 3 neighbours. An image without known pixels becomes
    grey.

    Args:
        known: I (1 - M).
        mask: M [B, 1, H, W] in [0, 1].
        sweeps: relaxations per level.
    """
    dtype = torch.promote_types(known.dtype, torch.float32)  # half precision would leave bands
    share = 1 - mask.to(dtype)
    mean = known.to(dtype) / share.where(share > 0, 1)
    levels = [(mean, share)]
    sides = share.shape[2:]
    is_open = any(isinstance(side, torch.SymInt) for side in sides)  # the size, in an exported graph
    for _ in range(OPEN_LEVELS if is_open else (max(sides) - 1).bit_length()):
        sums, share = (F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2) for x in (mean * share, share))  # of half the size, up
        mean, share = sums / share.where(share > 0, 1), (share > 0).to(dtype)
        levels.append((mean, share))
    out = torch.full_like(mean, 0.5)
    for mean, share in reversed(levels):
        out = F.interpolate(out, scale_factor=2, mode="bilinear")[..., : mean.shape[2], : mean.shape[3]]
        for _ in range(sweeps):
            out = torch.lerp(out, mean, share)
            out = F.avg_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, 1)
        out = torch.lerp(out, mean, share)
    return out.to(known.dtype)


def initialize(encoders: Sequence[Any], decoder: Any, others: Sequence[nn.Module]) -> None:
    """He initialization plus near-identity paths: encoders move pixels into channels, and the decoder moves them back.

    The first channels of a new network's features are therefore the masked image and its mask; the ResNet blocks add
    little.
    """
    for layer in (layer for part in (*encoders, decoder, *others) for layer in part.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            terms = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose2d):  # the terms of one output pixel
                terms = layer.in_channels * math.prod(layer.kernel_size) // math.prod(layer.stride)
            nn.init.normal_(layer.weight, std=math.sqrt(2 / terms))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for encoder in encoders:
        first = encoder[0].weight.data
        count = min(len(first), 4)
        first[:count] = 0
        first[range(count), range(count), 3, 3] = 1
        for layer in (encoder[2], encoder[4]):
            count = _init_space_to_depth(layer, count)
        for block in list(encoder)[6:]:
            block.body[2 if block.norm == "none" else 3].weight.data.mul_(0.1)
    _init_space_to_depth(decoder[2], _init_space_to_depth(decoder[0], 16) // 16)


def _init_space_to_depth(layer: Any, count: int) -> int:
    """Initializes a convolution of stride 2 as space-to-depth, a transposed one as depth-to-space.

    Args:
        layer: with a weight [coarse, fine, 4, 4].
        count: channels at the higher resolution to copy; each 2 x 2 block of pixels becomes four channels at the lower.

    Returns:
        The number of channels used at the lower resolution, 4 times those copied.
    """
    weight = layer.weight.data  # [coarse, fine, 4, 4], transposed or not
    count = min(count, weight.shape[1], len(weight) // 4)
    made = weight[:, :count] if isinstance(layer, nn.ConvTranspose2d) else weight[: 4 * count]
    made.zero_()
    for channel in range(count):
        for pixel in range(4):
            weight[4 * channel + pixel, channel, 1 + pixel // 2, 1 + pixel % 2] = 1
    return 4 * count
