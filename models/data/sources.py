"""Pictures and masks to train on, from files and folders. Files that cannot be used are skipped and reported."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image

from . import masks
from .folders import SUFFIXES
from .images import read, to_image

FREE_FORM = "free-form"
WHITE = 128  # from this value (of 255) on, a pixel of a mask is missing


def find(places: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Returns the picture files in folders (at any depth) and lists, sorted within each folder.

    Args:
        places: one or several folders, picture files, or .txt files with a path in each line, relative to the list.

    Raises:
        OSError: a place does not exist.
        ValueError: there is no picture.
    """
    places = [places] if isinstance(places, str | os.PathLike) else list(places)
    found = [path for place in places for path in _in(Path(place))]
    if not found:
        raise ValueError(f"{', '.join(map(str, places))}: no pictures ({', '.join(sorted(SUFFIXES))})")
    return found


def _in(place: Path) -> Iterator[Path]:
    if place.is_dir():
        files = (path for path in sorted(place.rglob("*")) if path.suffix.lower() in SUFFIXES)
        yield from (path for path in files if not path.name.startswith(".") and path.is_file())
    elif place.suffix == ".txt":
        lines = (line.strip() for line in place.read_text().splitlines())
        yield from (place.parent / line for line in lines if line)
    else:
        os.stat(place)
        yield place


class Pictures:
    """Pictures by index as RGB images of 8 bits, decoded when they are asked for; without their transparency.

    Args:
        items: paths, or images.
        min_side: the least side, in pixels.
        max_pixels: the most pixels.
        cache: bytes of decoded pictures to keep.
    """

    def __init__(
        self, items: Sequence[Path | Image.Image], min_side: int = 1, max_pixels: float = 1e8, cache: float = 0
    ):
        self.items, self.min_side, self.max_pixels, self.room = items, min_side, max_pixels, cache
        self._kept: dict[int, Image.Image] = {}
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Image.Image:
        """Returns a picture.

        Raises:
            OSError, ValueError: it cannot be read, or is too small or too large.
        """
        item = self.items[index]
        if isinstance(item, Image.Image):
            return item
        if index in self._kept:
            return self._kept[index]
        image = to_image(read(item, self.max_pixels).colour.expand(-1, 3, -1, -1))
        if min(image.size) < self.min_side:
            raise ValueError(f"{item}: {image.width} x {image.height} pixels; min_side is {self.min_side}")
        size = 3 * image.width * image.height
        if size <= self.room:
            self.room -= size
            self._kept[index] = image
        return image

    def usable(self, index: int, problems: list[str]) -> tuple[int, Image.Image]:
        """Returns the picture `index`, or the next one that can be used, with its index.

        Args:
            problems: to which a sentence for each skipped file is appended, whenever it is met.

        Raises:
            ValueError: no picture can be used.
        """
        for other in range(index, index + len(self)):
            other %= len(self)
            if other not in self._bad:
                try:
                    return other, self[other]
                except (OSError, ValueError) as error:
                    self._bad[other] = f"skipped: {error}"
            problems.append(self._bad[other])
        raise ValueError(f"none of {len(self)} pictures can be used; the first {problems[0]}")


class Part(NamedTuple):
    """A part of a picture at some size.

    Attributes:
        box: (left, top, right, bottom) in the picture, in pixels.
        size: (h, w) of the result.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]

    def cut(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
        """Returns the part, resized."""
        return image.resize(self.size[::-1], resample, self.box)


class Masks:
    """Draws masks of parts of pictures, 1 = missing.

    Args:
        source: "free-form", a kind of `masks.draw`, or folders and lists of masks, as of `find`; white is missing.
        pairing: for folders: "random" masks, stretched to the part's size and mirrored at random, or by "name", the
            part of the mask that has the name of the picture, without suffixes.
        share: the least and the largest share of missing pixels of free-form masks.
        pictures: for which every name must be found.

    Raises:
        OSError: a folder does not exist.
        ValueError: a mask is missing, or the range of a kind is none.
    """

    def __init__(
        self, source: str | Sequence[str], pairing: str, share: Sequence[float], pictures: Pictures | None = None
    ):
        self.share, self.pairing = share, pairing
        self.kind = source if isinstance(source, str) and source.split(":")[0] in masks.KINDS else None
        if self.kind:
            masks.parse(self.kind)
        drawn = self.kind or source == FREE_FORM
        self.pictures = None if drawn else Pictures(find(source), cache=2**28)
        self.names: dict[str, int] = {}
        if pairing not in ("random", "name"):
            raise ValueError(f"pairing must be random or name; got {pairing}")
        if self.pictures and pairing == "name":
            stems = [Path(str(path)).stem for path in self.pictures.items]
            self.names = {stem: i for i, stem in enumerate(stems)}
            if twice := [stem for stem in self.names if stems.count(stem) > 1]:
                raise ValueError(f"masks: several have the name {twice[0]}; pairing=name needs one of each name")
            files = [item for item in (pictures.items if pictures else ()) if isinstance(item, Path)]
            if missing := [file.name for file in files if file.stem not in self.names]:
                raise ValueError(f"masks: none has the name of {', '.join(missing[:3])}")

    def draw(
        self, item: Path | Image.Image, image: Image.Image, part: Part, rng: numpy.random.Generator, problems: list[str]
    ) -> torch.Tensor:
        """Returns the mask [1, h, w] of a part of a picture, float32.

        Args:
            item: the picture's path; for masks paired by name.
            image: the picture.
            part: what is cut from it.
            rng: the random generator.
            problems: as of `Pictures.usable`.
        """
        if self.kind:
            return torch.from_numpy(masks.draw(self.kind, *part.size, rng)).float()[None]
        if self.pictures is None:
            low, high = self.share
            return masks.free_form_mask(part.size, rng, rng.uniform(low, high))
        nearest = Image.Resampling.NEAREST
        if self.names and isinstance(item, Path):
            mask = part.cut(self.pictures[self.names[item.stem]].resize(image.size, nearest), nearest)
        else:
            _, mask = self.pictures.usable(int(rng.integers(len(self.pictures))), problems)
            mask = mask.resize(part.size[::-1], nearest)
            if rng.random() < 0.5:
                mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy((numpy.asarray(mask.convert("L")) >= WHITE).astype(numpy.float32))[None]
