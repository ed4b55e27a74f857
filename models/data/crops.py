"""Random crops of photographs, and the batches of them that the networks are trained on."""

import math
from collections.abc import Sequence

import numpy
import torch
from PIL import Image

from .images import to_tensor
from .masks import free_form_mask

LIIF_SIDE, DEAR_SIDE = 48, 40  # of an input crop
ZOOM = 2  # the most by which a photograph is shrunk, to give sharper crops
ASPECTS = (9 / 16, 16 / 9)
SHARES = (0.05, 0.4)  # of missing pixels

Photos = Sequence[Image.Image]
Rng = numpy.random.Generator


def square_crop(photo: Image.Image, rng: Rng, side: int) -> Image.Image:
    """Returns a random square of a photograph, in half of the cases shrunk by a random factor of up to `ZOOM`."""
    zoom = rng.uniform(1, min(ZOOM, min(photo.size) / side)) if rng.random() < 0.5 else 1
    left, top = (rng.uniform(0, n - side * zoom) for n in photo.size)
    if zoom == 1:
        left, top = int(left), int(top)
    return photo.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + side * zoom, top + side * zoom))


def liif_pair(photos: Photos, rng: Rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a low-resolution crop and its original, LIIF's training data, flipped and transposed at random.

    Returns:
        (input [3, 48, 48], target [n, n, 3]), both in [-1, 1]; n is 48 times a random scale from 1 to 4.
    """
    photo = photos[int(rng.integers(len(photos)))]
    target = square_crop(photo, rng, round(LIIF_SIDE * rng.uniform(1, 4)))
    source = target.resize((LIIF_SIDE, LIIF_SIDE), Image.Resampling.BICUBIC)
    flips = [slice(None, None, step) for step in rng.choice([-1, 1], 2)]
    axes = (1, 0, 2) if rng.random() < 0.5 else (0, 1, 2)
    channels = rng.permutation(3)
    inp, original = (
        torch.from_numpy(numpy.asarray(p, numpy.float32)[tuple(flips)][..., channels].transpose(axes).copy()) / 127.5
        - 1
        for p in (source, target)
    )
    return inp.permute(2, 0, 1), original


def liif_batch(
    photos: Photos, rng: Rng, size: int, queries: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns `size` pairs of `liif_pair`, of whose targets random pixels are the queries.

    Returns:
        inp [B, 3, 48, 48] in [-1, 1], coord [B, Q, 2], cell [B, 2], rgb [B, Q, 3] in [-1, 1].
    """
    parts = []
    for _ in range(size):
        source, target = liif_pair(photos, rng)
        n = len(target)
        pixels = torch.from_numpy(rng.integers(n, size=(queries, 2)))
        rgb, pixels = target[pixels[:, 0], pixels[:, 1]], pixels.to(target.dtype)
        parts.append((source, (2 * pixels + 1) / n - 1, source.new_full((2,), 2 / n), rgb))
    inp, coord, cell, rgb = map(torch.stack, zip(*parts, strict=True))
    return inp, coord, cell, rgb


def dear_pair(photos: Photos, rng: Rng, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a low-resolution crop and its original, turned and mirrored at random, their channels permuted.

    Returns:
        (input [3, 40, 40], target [3, n, n]), both in [0, 1]; n is 40 times the scale.
    """
    target = square_crop(photos[int(rng.integers(len(photos)))], rng, round(DEAR_SIDE * scale))
    target = target.transpose(rng.choice(list(Image.Transpose))) if rng.random() < 0.9 else target
    source = target.resize((DEAR_SIDE, DEAR_SIDE), Image.Resampling.BICUBIC)
    channels = rng.permutation(3)
    return to_tensor(source)[0, channels], to_tensor(target)[0, channels]


def dear_batch(photos: Photos, rng: Rng, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns `size` pairs of `dear_pair` of one random scale from 1 to 4, and masks of the inputs.

    Returns:
        image [B, 3, 40, 40], mask [B, 1, 40, 40], target [B, 3, n, n].
    """
    scale = rng.uniform(1, 4)
    pairs = [dear_pair(photos, rng, scale) for _ in range(size)]
    masks = [free_form_mask((DEAR_SIDE, DEAR_SIDE), rng, rng.uniform(*SHARES)) for _ in pairs]
    image, target = map(torch.stack, zip(*pairs, strict=True))
    return image, torch.stack(masks), target


def in2_shape(rng: Rng, area: int) -> tuple[int, int]:
    """Draws the shape (h, w) of a batch: h w = area up to rounding, log h / w uniform between 9:16 and 16:9.

    The adaptive training strategy of IN²'s paper, whose area is 512². The sides need not be multiples of 8.
    """
    low, high = map(math.log, ASPECTS)
    aspect = math.exp(rng.uniform(low, high))
    height = round(math.sqrt(area * aspect))
    return height, round(area / height)


def in2_crop(photos: Photos, rng: Rng, shape: tuple[int, int]) -> torch.Tensor:
    """Returns a random crop [3, h, w] in [0, 1] of a photograph, shrunk by up to `ZOOM` and mirrored at random.

    The channels are permuted, and each is inverted in half of the cases. Otherwise grey remains the best prediction
    for a long time.
    """
    photo = photos[int(rng.integers(len(photos)))]
    most = min(n / m for n, m in zip(photo.size, reversed(shape), strict=True))
    zoom = rng.uniform(min(1, most), min(ZOOM, most)) if rng.random() < 0.5 else min(1, most)
    width, height = (m * zoom for m in reversed(shape))
    left, top = (int(rng.uniform(0, n - m)) for n, m in zip(photo.size, (width, height), strict=True))
    crop = to_tensor(photo.resize(shape[::-1], Image.Resampling.BICUBIC, (left, top, left + width, top + height)))[0]
    axes = [axis for axis in (1, 2) if rng.random() < 0.5]
    inverted = torch.from_numpy(rng.random((3, 1, 1)) < 0.5)
    return torch.where(inverted, 1 - crop, crop)[rng.permutation(3)].flip(axes)


def in2_batch(photos: Photos, rng: Rng, size: int, area: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns image [B, 3, h, w] and mask [B, 1, h, w] of one random shape."""
    shape = in2_shape(rng, area)
    masks = [free_form_mask(shape, rng, rng.uniform(*SHARES)) for _ in range(size)]
    return torch.stack([in2_crop(photos, rng, shape) for _ in masks]), torch.stack(masks)
