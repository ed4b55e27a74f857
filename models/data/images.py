"""Reads and writes image files, and converts between Pillow images and tensors."""

import math
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..common.files import atomic_write

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
FORMATS |= {".tif": "TIFF", ".tiff": "TIFF"}
LONGEST = {"JPEG": 65500, "WEBP": 16383}  # pixels a side
OPAQUE = {"JPEG", "BMP"}
SAVE = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


@dataclass
class Picture:
    """An image as tensors, float32 in [0, 1].

    Attributes:
        colour: [1, 1 or 3, h, w].
        alpha: [1, 1, h, w], or None if the file has none.
        depth: bits per sample in the file, 8 or 16.
        icc: the colour profile.
        frames: number of frames in the file.
    """

    colour: torch.Tensor
    alpha: torch.Tensor | None = None
    depth: int = 8
    icc: bytes | None = None
    frames: int = 1


def read(path: str | os.PathLike[str], max_pixels: float) -> Picture:
    """Reads the first frame of an image file, rotated upright: grey or RGB, with alpha, 8 or 16 bits.

    16 bits are kept for greyscale and for any PNG. Palettes, CMYK and other modes become RGB.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not an image, is damaged, or has more pixels than max_pixels.
    """
    with open(path, "rb"):  # the system's own error, before Pillow's
        pass
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # max_pixels is checked instead
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(path, max_pixels)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image format that Pillow reads") from None
    except DAMAGED as error:
        raise ValueError(f"{path}: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _read(path: str | os.PathLike[str], max_pixels: float) -> Picture:
    with Image.open(path) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"{width} x {height} pixels are more than the limit of {max_pixels / 1e6:g}"
                " megapixels; --max-megapixels raises it"
            )
        raw = image.tile[0].args if image.format == "PNG" and image.tile else ""
        frames, mode = getattr(image, "n_frames", 1), image.mode
        # The profile does not apply to converted colours.
        icc = None if mode in ("CMYK", "LAB", "YCbCr") else image.info.get("icc_profile")
        if raw in ("RGB;16B", "RGBA;16B", "LA;16B"):
            samples, depth = _read_deep(path, raw), 16
        elif mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
            samples, depth = numpy.asarray(ImageOps.exif_transpose(image)), 16
        elif mode in ("I", "F"):
            raise ValueError(
                f"images of 32 bits per sample (mode {mode}) are not supported: their white level is not known"
            )
        else:
            upright = ImageOps.exif_transpose(image)  # before the conversion, which drops the EXIF data
            mode = "L" if mode in ("1", "L", "LA") else "RGB"
            mode += "A" if upright.has_transparency_data else ""
            samples, depth = numpy.asarray(upright.convert(mode)), 8
    values = torch.from_numpy(samples.astype(numpy.float32) / (2**depth - 1))
    values = values.reshape(*values.shape[:2], -1).permute(2, 0, 1)[None]
    colours = 3 if values.shape[1] > 2 else 1
    alpha = values[:, colours:] if values.shape[1] > colours else None
    return Picture(values[:, :colours], alpha, depth, icc, frames)


def _read_deep(path: str | os.PathLike[str], raw: str) -> numpy.ndarray:
    """Reads [h, w, channels] uint16 of a 16-bit PNG that Pillow would truncate to 8 bits.

    Pillow's decoder takes the first byte of each sample or, told that the samples are little-endian, the second. For
    grey with alpha it can return all four bytes, as if they were RGBA.
    """

    def decode(layout: str) -> numpy.ndarray:
        with Image.open(path) as image:
            image.tile = [image.tile[0]._replace(args=layout)]
            if layout == "RGBA":
                image._mode = layout
            return numpy.asarray(ImageOps.exif_transpose(image)).astype(numpy.uint16)

    if raw == "LA;16B":
        both = decode("RGBA")
        return both[..., ::2] << 8 | both[..., 1::2]
    return decode(raw) << 8 | decode(raw.replace("16B", "16L"))


def write(path: str | os.PathLike[str], picture: Picture) -> None:
    """Writes an image atomically, in the format of the suffix.

    PNG keeps 16 bits, TIFF only for grey images; the others have 8. JPEG and BMP drop the alpha channel.
    """
    kind = FORMATS[Path(path).suffix.lower()]
    parts = [picture.colour] if picture.alpha is None or kind in OPAQUE else [picture.colour, picture.alpha]
    values = torch.cat(parts, 1)[0].permute(1, 2, 0)
    grey = values.shape[2] == 1
    deep = picture.depth == 16 and (kind == "PNG" or (kind == "TIFF" and grey))
    samples = (values * (65535 if deep else 255)).round_().numpy().astype(numpy.uint16 if deep else numpy.uint8)
    with atomic_write(path) as temporary:
        if deep and not grey:
            temporary.write_bytes(_png(samples, picture.icc))
            return
        image = Image.fromarray(samples[..., 0] if grey else samples)
        profile = {"icc_profile": picture.icc} if picture.icc and kind != "BMP" else {}
        image.save(temporary, kind, **SAVE.get(kind, {}), **profile)


def _png(samples: numpy.ndarray, icc: bytes | None) -> bytes:
    """Encodes [h, w, 2, 3 or 4] uint16 samples as a 16-bit PNG, which Pillow cannot write."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").reshape(height, -1).view(numpy.uint8)
    # PNG filter 1, the difference from the pixel to the left, compresses better.
    rows[:, 2 * channels :] -= rows[:, : -2 * channels].copy()
    rows = numpy.pad(rows, ((0, 0), (1, 0)), constant_values=1)
    kind = {2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
            chunk(b"iCCP", b"profile\0\0" + zlib.compress(icc)) if icc else b"",
            chunk(b"IDAT", zlib.compress(rows.tobytes())),
            chunk(b"IEND", b""),
        ]
    )


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Converts an 8-bit RGB image of Pillow to [1, 3, h, w] float32 in [0, 1]."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None] / 255


def to_image(tensor: torch.Tensor) -> Image.Image:
    """Converts [1, 3, h, w] in [0, 1] to an 8-bit RGB image of Pillow."""
    return Image.fromarray((tensor[0].float() * 255).round().byte().permute(1, 2, 0).numpy())


def shrink(image: Image.Image, scale: float) -> tuple[Image.Image, Image.Image]:
    """Returns the image shrunk by `scale` (bicubic, antialiased), and the part of the original that it shows."""
    size = [math.floor(n / scale + 1e-9) for n in image.size]
    shown = image.crop((0, 0, round(size[0] * scale), round(size[1] * scale)))
    return shown.resize((size[0], size[1]), Image.Resampling.BICUBIC), shown
