"""Writing image files, with the metadata that their format can hold."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import ExifTags, Image

from inr_kernels._core.files import replace_file

from . import png
from .picture import FORMATS, KEEPS, OPAQUE, SAVE, Picture

_MAX_SEGMENT = 65000  # bytes of EXIF or XMP in a JPEG
_XMP = 700  # a TIFF tag


def encode(picture: Picture, suffix: str) -> tuple[bytes, list[str]]:
    """Encodes the picture in the format of a file name's suffix.

    Returns the bytes of the file and a sentence for each thing that the format cannot hold.

    16 bits go into PNG and, as Pillow writes no others, into TIFF without colour and alpha; alpha into neither JPEG
    nor BMP.
    """
    kind = FORMATS[suffix.lower()]
    values = picture.colour
    if picture.alpha is not None and kind not in OPAQUE:
        values = torch.cat((values, picture.alpha), 1)
    grey = values.shape[1] == 1
    deep = picture.depth == 16 and (kind == "PNG" or (kind == "TIFF" and grey))
    scaled = (values * (65535 if deep else 255)).round_()[0].permute(1, 2, 0).numpy()
    samples = scaled.astype(numpy.uint16 if deep else numpy.uint8)
    metadata = dict(picture.metadata)
    dropped = [name for name in metadata if name not in KEEPS[kind]]
    exif = _resized(metadata.get("EXIF"), samples.shape)
    for name, value in (("EXIF", exif), ("XMP", metadata.get("XMP", b""))):
        if kind == "JPEG" and len(value) > _MAX_SEGMENT:
            dropped.append(name)
    kept = {name: value for name, value in metadata.items() if name not in dropped}
    exif = exif if "EXIF" in kept else b""
    if kind == "PNG":
        data = png.encode_deep(samples) if deep else _save(samples, kind, {})
        data = png.insert(data, _chunks(kept, exif))
    else:
        names = {"icc_profile": "colour profile", "dpi": "resolution", "xmp": "XMP", "comment": "comment"}
        options: dict[str, Any] = {option: kept[name] for option, name in names.items() if name in kept}
        if exif:
            options["exif"] = exif
        if kind == "TIFF" and "xmp" in options:
            options["tiffinfo"] = tags = Image.Exif()
            tags.load(options.pop("exif", b""))
            tags[_XMP] = options.pop("xmp")
        data = _save(samples, kind, options)
    notes = [f"{kind} cannot hold the picture's {', '.join(sorted(set(dropped)))}"] if dropped else []
    if picture.depth == 16 and not deep:
        notes.append(f"8 of the picture's 16 bits are written to {kind}; PNG keeps all")
    return data, notes


def write(path: str | os.PathLike, picture: Picture) -> list[str]:
    """Writes the picture as a whole or not at all, in the format of the suffix; returns `encode`'s sentences."""
    data, notes = encode(picture, Path(path).suffix)
    replace_file(path, data)
    return notes


def _save(samples: numpy.ndarray, kind: str, options: dict[str, Any]) -> bytes:
    """Encodes samples [h, w, 1, 2, 3 or 4] with Pillow, in its format `kind` with these options of Image.save."""
    file = io.BytesIO()
    Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples).save(
        file, kind, **SAVE.get(kind, {}), **options
    )
    return file.getvalue()


def _resized(exif: Image.Exif | None, shape: tuple[int, ...]) -> bytes:
    """The EXIF data with the sides that it names set to those of the picture."""
    if exif is None:
        return b""
    part = exif.get_ifd(ExifTags.IFD.Exif)
    for tag, side in ((ExifTags.Base.ExifImageWidth, shape[1]), (ExifTags.Base.ExifImageHeight, shape[0])):
        if tag in part:
            part[tag] = side
    return exif.tobytes()


def _chunks(metadata: dict[str, Any], exif: bytes) -> Iterator[png.Chunk]:
    """The PNG chunks of metadata."""
    if profile := metadata.get("colour profile"):
        yield b"iCCP", b"profile\0\0" + zlib.compress(profile)
    for name in ("CICP", "gamma", "text"):
        yield from metadata.get(name, [])
    if resolution := metadata.get("resolution"):
        yield b"pHYs", struct.pack(">IIB", *(round(float(n) / 0.0254) for n in resolution), 1)
    if exif:
        yield b"eXIf", exif.removeprefix(b"Exif\0\0")
    if xmp := metadata.get("XMP"):
        yield b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    if comment := metadata.get("comment"):
        yield b"tEXt", b"Comment\0" + comment
