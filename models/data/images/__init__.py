"""Reading and writing image files: pixels and metadata."""

import math

import numpy
import torch
from PIL import Image

from .picture import FORMATS, KEEPS, MAX_SIDE, OPAQUE, SAVE, Picture
from .reading import READS, Header, read, read_header
from .writing import encode, write

__all__ = [
    "FORMATS",
    "KEEPS",
    "MAX_SIDE",
    "OPAQUE",
    "READS",
    "SAVE",
    "Header",
    "Picture",
    "encode",
    "read",
    "read_header",
    "shrink",
    "to_image",
    "to_tensor",
    "write",
]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An 8-bit RGB image of Pillow -> [1, 3, h, w], float32 in [0, 1]."""
    return torch.from_numpy(numpy.array(image, numpy.float32)).permute(2, 0, 1)[None] / 255


def to_image(tensor: torch.Tensor) -> Image.Image:
    """[1, 3, h, w] in [0, 1] -> an 8-bit RGB image of Pillow."""
    return Image.fromarray((tensor[0].float() * 255).round().byte().permute(1, 2, 0).numpy())


def shrink(image: Image.Image, scale: float) -> tuple[Image.Image, Image.Image]:
    """Returns the downscaled image and the part of the original that it shows (bicubic with antialiasing)."""
    size = [math.floor(n / scale + 1e-9) for n in image.size]
    right, bottom = (round(n * scale) for n in size)
    shown = image.crop((0, 0, right, bottom))
    return shown.resize(size, Image.Resampling.BICUBIC), shown
