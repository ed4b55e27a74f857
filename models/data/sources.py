"""Pictures and masks to train on, from files and folders. Files that cannot be used are skipped and reported."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image

from . import masks
from .folders import SUFFIXES
from .images import Picture, read, to_image

FREE_FORM = "free-form"


class File(NamedTuple):
    """A picture file. name: its path below the folder or the list that was searched, without the suffix."""

    path: Path
    name: str


Item = File | Image.Image


def find(places: str | os.PathLike | Iterable[str | os.PathLike]) -> list[File]:
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


def _in(place: Path) -> Iterator[File]:
    if place.is_dir():
        files = (path for path in sorted(place.rglob("*")) if path.suffix.lower() in SUFFIXES)
        found = [path for path in files if not path.name.startswith(".") and path.is_file()]
        yield from (File(path, path.relative_to(place).with_suffix("").as_posix()) for path in found)
    elif place.suffix == ".txt":
        lines = (Path(line.strip()) for line in place.read_text().splitlines() if line.strip())
        for line in lines:
            yield File(
                place.parent / line, (Path(line.name) if line.is_absolute() else line).with_suffix("").as_posix()
            )
    else:
        os.stat(place)
        yield File(place, place.stem)


class Pictures:
    """Pictures by index as RGB images of 8 bits, decoded when they are asked for; without their transparency.

    Args:
        items: files, or images.
        min_side: the least side, in pixels.
        max_pixels: the most pixels.
        cache: bytes of decoded pictures to keep.
    """

    def __init__(self, items: Sequence[Item], min_side: int = 1, max_pixels: float = 1e8, cache: float = 0):
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
        image = self._convert(read(item.path, self.max_pixels))
        if min(image.size) < self.min_side:
            raise ValueError(f"{item.path}: {image.width} x {image.height} pixels; min_side is {self.min_side}")
        size = len(image.getbands()) * image.width * image.height
        if size <= self.room:
            self.room -= size
            self._kept[index] = image
        return image

    def _convert(self, picture: Picture) -> Image.Image:
        return to_image(picture.colour.expand(-1, 3, -1, -1))

    def usable(
        self, index: int, problems: list[str], check: Callable[[Item], object] = lambda item: None
    ) -> tuple[int, Image.Image]:
        """Returns the picture `index`, or the next one that can be used, with its index.

        Args:
            problems: to which a sentence for each skipped file is appended, whenever it is met.
            check: raises as `self[index]` does if what belongs to a picture cannot be used.

        Raises:
            ValueError: no picture can be used.
        """
        for other in range(index, index + len(self)):
            other %= len(self)
            if other not in self._bad:
                try:
                    check(self.items[other])
                    return other, self[other]
                except (OSError, ValueError) as error:
                    self._bad[other] = f"skipped: {error}"
            problems.append(self._bad[other])
        raise ValueError(f"none of {len(self)} pictures can be used; the first {problems[0]}")


class MaskFiles(Pictures):
    """As Pictures: masks of one channel, 255 where a pixel is missing."""

    def _convert(self, picture: Picture) -> Image.Image:
        return Image.fromarray(masks.from_picture(picture)[0, 0].byte().numpy() * 255)


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
        source: "free-form", a kind of `masks.draw`, or folders and lists of masks, as of `find`, see
            `masks.from_picture`.
        pairing: for folders: "random" masks, stretched to the part's size and mirrored at random, or by "name", the
            part of the mask that has the name of the picture: their paths below their folders, without suffixes.
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
        found = [] if drawn else find(source)
        self.pictures = MaskFiles(found, cache=2**28) if found else None
        self.names: dict[str, int] = {}
        if pairing not in ("random", "name"):
            raise ValueError(f"pairing must be random or name; got {pairing}")
        if found and pairing == "name":
            self.names = {file.name: i for i, file in enumerate(found)}
            if len(self.names) < len(found):
                ((name, _),) = Counter(file.name for file in found).most_common(1)
                raise ValueError(f"masks: several have the name {name}; pairing=name needs one of each name")
            files = [item for item in (pictures.items if pictures else ()) if isinstance(item, File)]
            if missing := [file.path.name for file in files if file.name not in self.names]:
                raise ValueError(f"masks: none has the name of {', '.join(missing[:3])}")

    def check(self, item: Item) -> None:
        """Raises OSError or ValueError if the mask that is paired with a picture cannot be used."""
        self._paired(item)

    def _paired(self, item: Item) -> Image.Image | None:
        if self.pictures is None or not self.names or not isinstance(item, File):
            return None
        return self.pictures[self.names[item.name]]

    def draw(
        self, item: Item, image: Image.Image, part: Part, rng: numpy.random.Generator, problems: list[str]
    ) -> torch.Tensor:
        """Returns the mask [1, h, w] of a part of a picture, float32.

        Args:
            item: the picture's file; for masks paired by name.
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
        if mask := self._paired(item):
            mask = part.cut(mask.resize(image.size, nearest), nearest)
        else:
            _, mask = self.pictures.usable(int(rng.integers(len(self.pictures))), problems)
            mask = mask.resize(part.size[::-1], nearest)
            if rng.random() < 0.5:
                mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy((numpy.asarray(mask) > 0).astype(numpy.float32))[None]
