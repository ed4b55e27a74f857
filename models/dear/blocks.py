"""DEAR's convolutions: the encoder that it has twice, and the two layers back to the picture's size."""

import math

import torch
from torch import nn
from torch.nn import functional as F

STRIDE = 4  # pixels of the picture to one of the latent
REACH = 2  # of the dilated convolution, which reflects its border: a latent must be longer


class InstanceNorm(nn.Module):
    """Every channel of every image to mean 0 and variance 1; one pixel alone becomes 0."""

    def forward(self, x):
        return torch.group_norm(x, x.shape[1])


class ResBlock(nn.Module):
    """x + conv3x3(ReLU(conv3x3(x, dilation 2))), the norm after each convolution."""

    def __init__(self, channels, norm):
        super().__init__()

        def conv(dilation):
            options = {"dilation": dilation, "padding": dilation, "padding_mode": "reflect", "bias": norm == "none"}
            layer = nn.Conv2d(channels, channels, 3, **options)
            return [layer] if norm == "none" else [layer, InstanceNorm()]

        self.norm = norm
        self.body = nn.Sequential(*conv(REACH), nn.ReLU(), *conv(1))

    def forward(self, x):
        return x + self.body(x)


class Encoder(nn.Sequential):
    """[masked picture, mask] [B, 4, 4 h, 4 w] -> [B, channels, h, w]: three convolutions, then ResNet blocks."""

    def __init__(self, channels, blocks, norm):
        super().__init__(
            nn.Conv2d(4, channels // 4, 7, padding=3, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 4, stride=2, padding=1),
            nn.ReLU(),
            *(ResBlock(channels, norm) for _ in range(blocks)),
        )


def enlarge(inputs, hidden, outputs):
    """Two transposed convolutions, each of which doubles the sides."""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, hidden, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(hidden, outputs, 4, stride=2, padding=1),
    )


def encoder_input(seen, mask, shortest, mode):
    """[picture; M] [B, 4, H, W], sides rounded up to what the encoder takes: the picture by F.pad's mode, as a hole.

    shortest: sides of the latent, at least.
    """
    right, below = (max(-n % STRIDE, shortest * STRIDE - n) for n in (mask.shape[3], mask.shape[2]))
    sides = (0, right, 0, below)
    both = torch.cat([F.pad(seen, sides, mode), F.pad(mask, sides, value=1)], 1)
    return both.contiguous(memory_format=torch.channels_last)


def smooth_fill(known, mask, sweeps=4):
    """I (1 - M) [B, 3, H, W] with its holes filled by what surrounds them: about the harmonic function.

    Down a pyramid of the known pixels' means, and up again: on each level a hole starts from the level below and is
    then swept to the mean of its 3 x 3 neighbours. A picture without a known pixel becomes grey.
    """
    dtype = torch.promote_types(known.dtype, torch.float32)  # half precision would leave bands
    share = 1 - mask.to(dtype)
    mean = known.to(dtype) / share.where(share > 0, 1)
    levels = [(mean, share)]
    while max(share.shape[2:]) > 1:
        even = (0, share.shape[3] % 2, 0, share.shape[2] % 2)
        sums, share = (F.avg_pool2d(F.pad(x, even), 2) for x in (mean * share, share))
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


def initialize(encoders, decoder, others):
    """He's initialization, but that the picture passes: encoders shuffle pixels into channels, the decoder back.

    So the first channels of a fresh network's features are the masked picture and its mask; the ResNet blocks add
    little.
    """
    for layer in (layer for part in (*encoders, decoder, *others) for layer in part.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            terms = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose2d):  # of its taps, those of one pixel
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
            count = _pass_pixels(layer, count)
        for block in list(encoder)[6:]:
            block.body[2 if block.norm == "none" else 3].weight.data.mul_(0.1)
    _pass_pixels(decoder[2], _pass_pixels(decoder[0], 16) // 16)


def _pass_pixels(layer, count):
    """Each of `count` channels on the fine side of a strided convolution is four of the coarse side, a pixel each."""
    weight = layer.weight.data  # [coarse, fine, 4, 4], transposed or not
    count = min(count, weight.shape[1], len(weight) // 4)
    made = weight[:, :count] if isinstance(layer, nn.ConvTranspose2d) else weight[: 4 * count]
    made.zero_()
    for channel in range(count):
        for pixel in range(4):
            weight[4 * channel + pixel, channel, 1 + pixel // 2, 1 + pixel % 2] = 1
    return 4 * count
