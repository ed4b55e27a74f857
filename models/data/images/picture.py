"""A picture in memory, and what each file format can hold of it."""

from dataclasses import dataclass, field
from typing import Any

import torch

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
FORMATS |= {".tif": "TIFF", ".tiff": "TIFF"}
MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}  # pixels
OPAQUE = {"JPEG", "BMP"}
SAVE = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
# What each format keeps of a picture's metadata.
KEEPS = {
    "PNG": {"colour profile", "resolution", "EXIF", "XMP", "comment", "text", "gamma", "CICP"},
    "JPEG": {"colour profile", "resolution", "EXIF", "XMP", "comment"},
    "WEBP": {"colour profile", "EXIF", "XMP"},
    "TIFF": {"colour profile", "resolution", "EXIF", "XMP"},
    "BMP": {"resolution"},
}


@dataclass
class Picture:
    """A picture in straight alpha.

    Attributes:
        colour: [1, 1 or 3, h, w], float32 in [0, 1].
        alpha: [1, 1, h, w], float32 in [0, 1], or None.
        depth: bits of a sample in the file, 8 or 16.
        metadata: values by the names that `KEEPS` uses.
        notes: a sentence for each thing that reading changed or dropped.
    """

    colour: torch.Tensor
    alpha: torch.Tensor | None = None
    depth: int = 8
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
