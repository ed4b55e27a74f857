"""Classical methods that the networks are compared with."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy
import torch
from PIL import Image

from ..common.masking import known
from ..common.smooth import smooth_fill
from ..data.images import to_image, to_tensor

# (image [1, 3, h, w], mask [1, 1, h, w] or None, (H, W)) -> [1, 3, H, W], all in [0, 1]
Method: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None, tuple[int, int]], torch.Tensor]
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}


def mean_fill(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Fills the missing pixels of image [B, 3, H, W], mask [B, 1, H, W], with the mean colour of the known ones.

    An image without known pixels becomes black.
    """
    weight = 1 - mask
    mean = known(image, mask).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp(min=1e-6)
    return known(image, mask) + mean * mask


def telea(photo: Image.Image, mask: torch.Tensor) -> Image.Image:
    """Fills the missing pixels of an image by OpenCV's inpainting with Telea's method.

    Args:
        photo: an 8-bit RGB image of H x W pixels.
        mask: [1, 1, H, W], 1 = missing.

    Raises:
        ImportError: OpenCV is not installed.
    """
    import cv2

    holes = mask[0, 0].byte().numpy()
    return Image.fromarray(cv2.inpaint(numpy.array(photo) * (1 - holes[..., None]), holes, 3, cv2.INPAINT_TELEA))


FILLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean colour": mean_fill,
    "smooth fill": lambda image, mask: smooth_fill(known(image, mask), mask),
    "Telea": lambda image, mask: to_tensor(telea(to_image(image), mask)),
}


def enlarge(image: torch.Tensor, size: tuple[int, int], name: str = "bicubic") -> torch.Tensor:
    """Enlarges an image [1, 3, h, w] to size (H, W) with Pillow, "bicubic" or "nearest"."""
    return to_tensor(to_image(image).resize(size[::-1], RESAMPLING[name]))


def baselines(fill: bool, larger: bool, without: Sequence[str] = ()) -> dict[str, Method]:
    """Returns the methods that fill, enlarge, or do both one after the other, by name.

    Args:
        fill: whether there are masks.
        larger: whether the output is larger than the image.
        without: names in `FILLS` that are left out, as Telea's method where OpenCV is missing.
    """
    fills = {name: function for name, function in FILLS.items() if name not in without}
    if not fill:
        return {name: _enlarging(None, name) for name in RESAMPLING} if larger else {}
    if not larger:
        return {name: _filling(function) for name, function in fills.items()}
    both = {f"{name}, bicubic": _enlarging(function, "bicubic") for name, function in fills.items()}
    return both | {"smooth fill, nearest": _enlarging(fills["smooth fill"], "nearest")}


def _filling(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Method:
    def method(image: torch.Tensor, mask: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        assert mask is not None
        return function(image, mask)

    return method


def _enlarging(fill: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None, name: str) -> Method:
    def method(image: torch.Tensor, mask: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        filled = image if fill is None or mask is None else fill(image, mask)
        return enlarge(filled, size, name)

    return method
