"""The batches of a training run: a function of the seed, the step and the files, whatever was drawn before."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..data.photographs import HELD_OUT, PART, TRAINED_ON, photographs
from ..data.sources import Masks, Part, Pictures, find


class Batches(Dataset):
    """Batches by number; with `accumulate`, the parts of step s have the numbers s * accumulate, s * accumulate + 1 ...

    Args:
        recipe: its module.
        options: an instance of its class Options.
        pictures: to train on.
        rank, world: of this process, and the number of processes, each of which gets its share of every part.
    """

    def __init__(self, recipe: Any, options: Any, pictures: Pictures, rank: int = 0, world: int = 1):
        self.recipe, self.options, self.pictures = recipe.__name__, options, pictures
        self.masks = None
        if hasattr(options, "masks"):
            self.masks = Masks(options.masks, options.pairing, options.share, pictures)
        self.rank, self.count = rank, options.batch // (options.accumulate * world)

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, number: int) -> tuple[tuple[torch.Tensor, ...], list[str]]:
        """Returns the tensors of a part of a batch for this process, and a sentence for each skipped file."""
        from importlib import import_module

        options, problems = self.options, list[str]()
        recipe = import_module(self.recipe)
        step, part = divmod(number, options.accumulate)
        shared = recipe.draw(options, numpy.random.default_rng([options.seed, step]))
        first = part * (options.batch // options.accumulate) + self.rank * self.count
        samples = []
        for position in range(first, first + self.count):
            rng = numpy.random.default_rng([options.seed, step, 1 + position])  # [..., 0] is that of `shared`
            epoch, place = divmod(step * options.batch + position, len(self.pictures))
            index = int(_order(options.seed, epoch, len(self.pictures))[place])
            index, image = self.pictures.usable(index, problems, *([self.masks.check] if self.masks else []))
            samples.append(recipe.sample(options, Drawing(self, index, image, problems), rng, shared))
        return tuple(map(torch.stack, zip(*samples, strict=True))), problems


class Drawing:
    """A picture that a sample is made of, and the masks of its parts.

    Attributes:
        image: the picture.
    """

    def __init__(self, batches: Batches, index: int, image: Image.Image, problems: list[str]):
        self.image, self._batches, self._index, self._problems = image, batches, index, problems

    def mask(self, part: Part, rng: numpy.random.Generator) -> torch.Tensor:
        """Returns a mask [1, h, w] of a part of the picture."""
        batches = self._batches
        assert batches.masks is not None
        return batches.masks.draw(batches.pictures.items[self._index], self.image, part, rng, self._problems)


@lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> numpy.ndarray:
    return numpy.random.default_rng([seed, epoch, count]).permutation(count)


def loader(batches: Batches, first: int, last: int, workers: int) -> Iterator[Any]:
    """Yields the batches with the numbers from first to last - 1, prepared by worker processes."""
    # With a generator of its own it draws nothing from torch's global one.
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )
    )


def training_pictures(options: Any) -> Pictures:
    """Returns the pictures that `data` names; errors: as `find` and `photographs`."""
    items: Any = find(options.data) if options.data else photographs(*TRAINED_ON)
    room = options.cache * 2**20 / max(1, options.workers)
    return Pictures(items, options.min_side, options.max_megapixels * 1e6, room)


def held_out(options: Any) -> list[Image.Image]:
    """Returns the middle of each picture that `validate` names, at most as large as the default; errors: as `find`."""
    if not options.validate:
        return [photographs(HELD_OUT)[0].crop(PART)]
    most = (PART[2] - PART[0], PART[3] - PART[1])
    found = []
    pictures = Pictures(find(options.validate), options.min_side, options.max_megapixels * 1e6)
    for index in range(len(pictures)):
        image = pictures[index]
        width, height = (min(pair) for pair in zip(image.size, most, strict=True))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        found.append(image.crop((left, top, left + width, top + height)))
    return found
