"""What is compared: settings of a table, pictures with their partners in other folders, and inputs made of them."""

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image

from ..common.masking import known
from ..data import folders, images, masks
from ..data.images import shrink, to_image, to_tensor


class Case(NamedTuple):
    """A setting of a table.

    name: of the setting. size: (H, W) to which the middle of each picture is resized, or None. scale: by which
    pictures are shrunk to be the input.
    """

    name: str = ""
    size: tuple[int, int] | None = None
    scale: float = 1

    @classmethod
    def of_size(cls, size: tuple[int, int]) -> "Case":
        """The case of a size (H, W), named as in IN²'s tables."""
        return cls(f"{size[0]} × {size[1]}", size)

    @classmethod
    def of_scale(cls, scale: float) -> "Case":
        """The case of a scale."""
        return cls(f"×{scale:g}", scale=scale)


_SIZES = [(512, 512), (768, 1024), (1024, 768), (1024, 576), (1024, 1024), (443, 591), (591, 443), (683, 384)]
# Of IN²'s tables 5 and 10, height × width, and of DEAR's table 2.
PRESETS = {
    "in2": [Case.of_size(size) for size in _SIZES],
    "dear": [Case.of_scale(scale) for scale in (1.5, 2, 3.5, 4, 5.5, 6, 7.5, 8)],
}


class Item(NamedTuple):
    """A picture, its mask (a file, a kind of `masks.KINDS`, or None), and outputs of other programs by their names."""

    name: str
    target: Path
    mask: Path | str | None = None
    predictions: Mapping[str, Path] = {}


Report = Callable[[str], object]  # (message), which begins with the name of a file


def pair(
    target: str | os.PathLike[str],
    masks_in: str | os.PathLike[str] | None = None,
    kind: str | None = None,
    predictions: Mapping[str, str | os.PathLike[str]] | None = None,
    report: Report = lambda message: None,
) -> list[Item]:
    """Pairs the pictures of folders by their names.

    A mask and a prediction have the picture's name, or that and `_mask000`, as LaMa writes them; suffixes may differ.
    A picture with several masks counts several times.

    Args:
        target: the folder of originals.
        masks_in: the folder of masks, which may be that of the originals.
        kind: of masks that are drawn, where there is no folder.
        predictions: folders of other programs' outputs, by their names in the table.
        report: called with a message for each file that is left out.

    Raises:
        NotADirectoryError: one is no folder.
        ValueError: a folder without pictures, or no picture has its partners.
    """
    originals = {name: path for name, path in folders.pictures(target).items() if not folders.is_mask(name)}
    drawn = folders.pictures(masks_in) if masks_in is not None else {}
    if masks_in is not None and os.path.samefile(masks_in, target):
        drawn = {name: path for name, path in drawn.items() if folders.is_mask(name)}
    outputs = {label: folders.pictures(folder) for label, folder in (predictions or {}).items()}
    by_picture = folders.masks_by_picture(drawn)
    items, used = [], set()
    for name, path in originals.items():
        for mask in by_picture.get(name, [None] if masks_in is None else []):
            found = {label: files.get(mask or name, files.get(name)) for label, files in outputs.items()}
            missing = [label for label, file in found.items() if file is None]
            if missing:
                report(f"{path}: has no partner in {', '.join(missing)}")
                continue
            used |= {*found.values(), drawn.get(mask or "")}
            present = {label: file for label, file in found.items() if file is not None}
            items.append(Item(mask or name, path, drawn.get(mask or "", kind), present))
        if masks_in is not None and name not in by_picture:
            report(f"{path}: has no mask")
    for file in (file for files in (drawn, *outputs.values()) for file in files.values()):
        if file not in used:
            report(f"{file}: belongs to no picture")
    if not items:
        raise ValueError(f"{target}: no picture has a partner of its name")
    return items


class Sample(NamedTuple):
    """An input [1, 3, h, w], its mask [1, 1, h, w] or None, and the original [1, 3, H, W], in [0, 1]."""

    image: torch.Tensor
    mask: torch.Tensor | None
    target: torch.Tensor


def load(item: Item, case: Case, seed: int, max_pixels: float) -> Sample:
    """Reads a picture and its mask in the form of a case; what is missing in the input is black.

    seed: of a mask that is drawn. max_pixels: the largest picture.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, or a mask has another size than its picture.
    """
    photo = read(item.target, max_pixels)
    size = photo.size[::-1]
    if case.size is not None:
        photo = middle(photo, case.size)
    small, shown = shrink(photo, case.scale) if case.scale > 1 else (photo, photo)
    image, mask = to_tensor(small), None
    height, width = image.shape[2:]
    if isinstance(item.mask, str):
        rng = numpy.random.default_rng([seed, zlib.crc32(item.name.encode())])
        mask = torch.from_numpy(masks.draw(item.mask, height, width, rng))[None, None].float()
    elif item.mask is not None:
        mask = masks.from_picture(images.read(item.mask, max_pixels))
        if (mask.shape[2], mask.shape[3]) not in (size, (height, width)):
            had = f"{mask.shape[3]}x{mask.shape[2]}"
            raise ValueError(f"{item.mask}: must have the size of its picture {size[1]}x{size[0]}; got {had}")
        if (mask.shape[2], mask.shape[3]) != (height, width):
            # A pixel that shows a part of a hole is missing: it would show a part of the original.
            shape = Image.fromarray(mask[0, 0].byte().numpy() * 255)
            shape = shape if case.size is None else middle(shape, case.size, Image.Resampling.BOX)
            shape = shrink(shape, case.scale)[0] if case.scale > 1 else shape
            mask = (torch.from_numpy(numpy.array(shape)) > 0).float()[None, None]
    return Sample(image if mask is None else known(image, mask), mask, to_tensor(shown))


def middle(
    photo: Image.Image, size: tuple[int, int], resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Returns the largest part in the middle of a picture with the aspect ratio of size (H, W), resized to it."""
    height, width = size
    share = min(photo.width / width, photo.height / height)
    left, top = (photo.width - share * width) / 2, (photo.height - share * height) / 2
    return photo.resize((width, height), resampling, (left, top, photo.width - left, photo.height - top))


def read(path: Path, max_pixels: float) -> Image.Image:
    """Reads a picture in 8 bits, without transparency; errors: as `images.read`."""
    return to_image(images.read(path, max_pixels).colour.expand(-1, 3, -1, -1))
