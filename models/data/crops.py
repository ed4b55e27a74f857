"""Parts of pictures that the networks are trained on, and how they are turned, mirrored and recoloured at random."""

import math
from collections.abc import Sequence

import numpy
import torch
from PIL import Image

from .images import to_tensor
from .sources import Part

Rng = numpy.random.Generator


def patch(size: tuple[int, int], rng: Rng, shape: tuple[int, int], zoom: float = 1) -> Part:
    """Returns a random patch of a picture; of a picture that is too small, a part of the patch's aspect ratio.

    Args:
        size: (width, height) of the picture.
        shape: (h, w) of the patch.
        zoom: in half of the cases the picture is shrunk by a random factor of up to this, which gives sharper patches.
    """
    most = min(n / m for n, m in zip(size, reversed(shape), strict=True))
    factor = rng.uniform(min(1, most), min(zoom, most)) if zoom > 1 and rng.random() < 0.5 else min(1, most)
    width, height = (m * factor for m in reversed(shape))
    left, top = (int(rng.uniform(0, max(n - m, 0))) for n, m in zip(size, (width, height), strict=True))
    return Part((left, top, min(left + width, size[0]), min(top + height, size[1])), shape)


def margins(size: tuple[int, int], rng: Rng, shape: tuple[int, int]) -> Part:
    """Returns the largest part of a picture that has the aspect ratio of `shape`, at a random position: only margins at
    two opposite sides are cut off. It is resized to the shape.

    size: (width, height); shape: (h, w).
    """
    factor = min(n / m for n, m in zip(size, reversed(shape), strict=True))
    width, height = (m * factor for m in reversed(shape))
    left, top = (rng.uniform(0, max(n - m, 0)) for n, m in zip(size, (width, height), strict=True))
    return Part((left, top, min(left + width, size[0]), min(top + height, size[1])), shape)


def shape_of(area: int, aspects: Sequence[float], rng: Rng) -> tuple[int, int]:
    """Draws a shape (h, w): h w = area up to rounding, log h / w uniform between the two aspects.

    With (9 / 16, 16 / 9) and 512² it is the adaptive training strategy of IN²'s paper. The sides need not be multiples
    of 8.
    """
    low, high = map(math.log, aspects)
    aspect = math.exp(rng.uniform(low, high))
    height = round(math.sqrt(area * aspect))
    return height, round(area / height)


class Change:
    """A random change that all tensors of a sample share.

    Args:
        rng: the random generator.
        turn: whether it may exchange the axes, for square parts; it may mirror in any case.
        permute: whether it permutes the channels of pictures.
        invert: whether it inverts each channel of pictures in half of the cases.
    """

    def __init__(self, rng: Rng, turn: bool = False, permute: bool = False, invert: bool = False):
        self.axes = [axis for axis in (1, 2) if rng.random() < 0.5]
        self.turned = turn and bool(rng.random() < 0.5)
        self.channels = rng.permutation(3) if permute else numpy.arange(3)
        self.inverted = torch.from_numpy(rng.random((3, 1, 1)) < 0.5) if invert else None

    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        """[C, h, w] -> [C, h, w] or [C, w, h], moved only."""
        mask = mask.flip(self.axes)
        return mask.transpose(1, 2) if self.turned else mask

    def picture(self, image: Image.Image) -> torch.Tensor:
        """An image -> [3, h, w] or [3, w, h] in [0, 1]."""
        tensor = to_tensor(image)[0]
        if self.inverted is not None:
            tensor = torch.where(self.inverted, 1 - tensor, tensor)
        return self.mask(tensor[self.channels]).contiguous()


def queries(target: torch.Tensor, rng: Rng, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws random pixels of a target [3, H, W]; count 0: all of them, in order.

    Returns:
        coord [Q, 2], (y, x) in [-1, 1]; cell [2], the size of a pixel; rgb [Q, 3].
    """
    size = numpy.array(target.shape[1:])
    if count:
        pixels = rng.integers(size, size=(count, 2))
    else:
        pixels = numpy.indices(tuple(target.shape[1:])).reshape(2, -1).T
    y, x = torch.from_numpy(pixels.T.copy())
    coord, cell = (torch.from_numpy(values.astype(numpy.float32)) for values in ((2 * pixels + 1) / size - 1, 2 / size))
    return coord, cell, target[:, y, x].T.contiguous()
