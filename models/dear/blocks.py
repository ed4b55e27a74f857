"""DEAR's encoder and upsampling layers, and the initialization."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from inr_kernels._core import dispatch

STRIDE = 4  # pixels of the image per pixel of the latent
REACH = 2  # padding of the dilated convolution; reflection needs a latent with longer sides


class InstanceNorm(nn.Module):
    """Normalizes every channel of every image to mean 0 and variance 1; a single pixel becomes 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if dispatch.is_transformed(x):  # torch.func has no memory formats
            return torch.group_norm(x, x.shape[1])
        # torch reads an image with channels last once for every channel.
        out = torch.group_norm(x.contiguous(), x.shape[1])
        last = x.is_contiguous(memory_format=torch.channels_last)
        return out.contiguous(memory_format=torch.channels_last) if last else out


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
