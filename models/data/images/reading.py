"""Reading image files: pixels and metadata."""

import contextlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from inr_kernels._core.text import printable

from . import png
from .picture import Picture

# Formats that are read; nothing else reaches Pillow's decoders (its EPS reader, for one, runs Ghostscript).
READS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
# EXIF tags of the picture itself that remain valid after editing; those of the Exif and GPS parts are all kept.
_EXIF = {"ImageDescription", "Make", "Model", "Software", "DateTime", "Artist", "Copyright", "Rating"}
_EXIF |= {"XPTitle", "XPComment", "XPAuthor", "XPKeywords", "XPSubject"}
_SCALED = {"L;2": 85, "L;4": 17}  # how Pillow scales such samples to 8 bits; the transparent sample it does not scale
_SRGB_GAMMA = 45455  # of a gAMA chunk
_ORIENTATION = re.compile(rb'tiff:Orientation="[0-9]"|<tiff:Orientation>[0-9]</tiff:Orientation>')  # in XMP
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap the sides
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags


class Header(NamedTuple):
    """What a picture's file says before its pixels are decoded: the sides as it is shown, and whether it has alpha."""

    height: int
    width: int
    alpha: bool


def read_header(source: str | os.PathLike | bytes, max_pixels: float, name: str = "") -> Header:
    """Reads the sides of an image file; arguments and errors: as `read`."""
    with _reading(source, name) as data, _open_checked(_decodable(data)[0], max_pixels) as image:
        exif, (width, height) = image.getexif(), image.size
        if image.format == "TIFF":  # the sides in the file; Pillow's are already those of the upright picture
            width, height = exif[ExifTags.Base.ImageWidth], exif[ExifTags.Base.ImageLength]
        if exif.get(ExifTags.Base.Orientation) in _TURNED:
            width, height = height, width
        return Header(height, width, image.has_transparency_data)


def read(source: str | os.PathLike | bytes, max_pixels: float, name: str = "") -> Picture:
    """Reads the first frame of an image file, upright: grey or RGB, with alpha, 8 or 16 bits.

    16 bits are kept of greyscale and of any PNG. Palettes, CMYK and the like become RGB, by the colour profile if there
    is one.

    Args:
        source: a path, which is read once, or the bytes of a file.
        max_pixels: the largest number of pixels.
        name: of the picture, for errors; "": the path, or "the input".

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not an image of a known format, damaged, or has more than max_pixels.
    """
    with _reading(source, name) as data:
        return _read(data, max_pixels)


@contextlib.contextmanager
def _reading(source: str | os.PathLike | bytes, name: str) -> Iterator[bytes]:
    """The bytes of the source; what decoding them raises becomes a ValueError with the name."""
    name = printable(name or ("the input" if isinstance(source, bytes) else os.fspath(source)))
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with _quiet_pillow():
            yield data
    except UnidentifiedImageError:
        raise ValueError(f"{name}: {_why_unknown(data)}") from None
    except DAMAGED as error:
        raise ValueError(f"{name}: {printable(str(error)) or type(error).__name__}") from error


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings and its limit of pixels; `read` checks its own."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _why_unknown(data: bytes) -> str:
    """Returns why Pillow does not recognize the file, and which package would read it."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if not data:
        return "the file is empty"
    if brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC pictures need pillow-heif: pip install pillow-heif"
    if brand in (b"avif", b"avis"):
        return "this Pillow was built without AVIF: pip install --upgrade pillow"
    return f"not a picture in a format that is read: {', '.join(READS)}"


def _open(data: bytes) -> Image.Image:
    """Opens a file in one of the formats `READS`, or HEIF if pillow-heif is installed, without decoding its pixels."""
    Image.init()
    formats = [name for name in READS if name in Image.OPEN]
    if data[4:8] == b"ftyp":
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
            formats.append("HEIF")
    return Image.open(io.BytesIO(data), formats=formats)


def _decodable(data: bytes) -> tuple[bytes, list[png.Chunk], bool]:
    """A file that Pillow opens, the PNG chunks that it must not see, and whether its samples are inverted."""
    extra: list[png.Chunk] = []
    if data.startswith(png.SIGNATURE):
        data, extra = png.split(data)
    data, inverted = _without_white_is_zero(data)
    return data, extra, inverted


@contextlib.contextmanager
def _open_checked(data: bytes, max_pixels: float) -> Iterator[Any]:
    """As `_open`; raises ValueError for too many pixels."""
    with _open(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"{width} x {height} pixels are more than the limit of {max_pixels / 1e6:g}"
                " megapixels; --max-megapixels raises it"
            )
        yield image


def _read(data: bytes, max_pixels: float) -> Picture:
    """Decodes the bytes of a file as `read` describes; raises ValueError for too many pixels, or what Pillow raises."""
    data, extra, inverted = _decodable(data)
    with _open_checked(data, max_pixels) as image:
        picture = Picture(torch.empty(0, dtype=torch.float32, device="cpu"))
        raw = image.tile[0].args if image.format == "PNG" and image.tile else ""  # before anything loads the pixels
        frames = _frames(image, extra)
        if frames > 1:
            picture.notes.append(f"has {frames} frames; using the first")
        _read_metadata(image, extra, picture)
        decoded = _samples(image, data, raw, picture)
    top = 2**picture.depth - 1
    samples = torch.from_numpy(decoded.astype(numpy.float32) / top)
    samples = samples.reshape(*samples.shape[:2], -1).permute(2, 0, 1)[None]
    if inverted:
        samples[:, :1] = 1 - samples[:, :1]
    colours = 3 if samples.shape[1] > 2 else 1
    picture.colour = samples[:, :colours]
    picture.alpha = samples[:, colours:] if samples.shape[1] > colours else None
    return picture


def _frames(image: Image.Image, extra: list[png.Chunk]) -> int:
    """Returns the number of frames; an animated PNG's is in its acTL chunk."""
    animation = dict(extra).get(b"acTL", b"")
    return int.from_bytes(animation[:4], "big") if animation else getattr(image, "n_frames", 1)


def _samples(image: Image.Image, data: bytes, raw: str, picture: Picture) -> numpy.ndarray:
    """[h, w] or [h, w, channels] of the upright picture, uint8 or uint16; sets the picture's depth."""
    key = image.info.get("transparency")
    if key is not None and raw in _SCALED:
        image.info["transparency"] = key * _SCALED[raw]
    if raw in ("RGB;16B", "RGBA;16B", "LA;16B"):
        picture.depth = 16
        return _with_key(_decode_deep(data, raw), key if raw == "RGB;16B" else None)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        picture.depth = 16
        return _with_key(numpy.asarray(ImageOps.exif_transpose(image)).astype(numpy.uint16), key)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"images with 32 bits per sample (mode {image.mode}) are not supported: their white level is unknown"
        )
    if max(getattr(image, "tag_v2", {}).get(_BITS, (8,))) > 8:  # Pillow reads a TIFF's colours as bytes
        picture.notes.append("8 of its 16 bits a sample are read; those of a PNG are kept")
    if image.mode in ("CMYK", "LAB"):
        image = _to_srgb(image, picture)
    upright = ImageOps.exif_transpose(image)  # before the conversion, which drops the EXIF orientation
    mode = "L" if upright.mode in ("1", "L", "LA", "La") else "RGB"
    mode += "A" if upright.has_transparency_data else ""
    if upright.mode == "La":  # Pillow converts premultiplied grey to LA alone
        upright = upright.convert("LA")
    return numpy.asarray(upright.convert(mode))


def _with_key(samples: numpy.ndarray, key: int | tuple[int, ...] | None) -> numpy.ndarray:
    """Adds an alpha channel in which the pixels of the colour `key` are transparent."""
    if key is None:
        return samples
    samples = samples.reshape(*samples.shape[:2], -1)
    alpha = (samples != numpy.array(key)).any(-1, keepdims=True)
    return numpy.concatenate((samples, alpha * numpy.uint16(65535)), -1)


def _to_srgb(image: Image.Image, picture: Picture) -> Image.Image:
    """A CMYK or Lab picture as sRGB, by its profile."""
    profile = picture.metadata.pop("colour profile", None)
    source: Any = io.BytesIO(profile) if profile else None
    if image.mode == "LAB":
        source = ImageCms.createProfile("LAB")
    if source is None:
        picture.notes.append("converts CMYK without a colour profile to RGB by a formula")
        return image.convert("RGB")
    try:
        turned = ImageOps.exif_transpose(image)
        converted = ImageCms.profileToProfile(turned, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        picture.notes.append(f"converts {image.mode} to RGB by a formula: its colour profile cannot be used")
        return image.convert("RGB")
    picture.notes.append(f"converts {image.mode} to sRGB")
    assert converted is not None  # it is None for a conversion in place only
    converted.info = {}
    return converted


def _decode_deep(data: bytes, raw: str) -> numpy.ndarray:
    """[h, w, channels] uint16 of a PNG that Pillow would truncate to 8 bits.

    Its decoder takes the first byte of each sample; told that the samples are little-endian, it takes the second. Of
    grey with alpha it can give all four bytes, as if they were RGBA.
    """

    def decode(layout: str) -> numpy.ndarray:
        image: Any
        with _open(data) as image:
            image.tile = [image.tile[0]._replace(args=layout)]
            if layout == "RGBA":
                image._mode = layout
            return numpy.asarray(ImageOps.exif_transpose(image)).astype(numpy.uint16)

    if raw == "LA;16B":
        both = decode("RGBA")
        return both[..., ::2] << 8 | both[..., 1::2]
    return decode(raw) << 8 | decode(raw.replace("16B", "16L"))


def _without_white_is_zero(data: bytes) -> tuple[bytes, bool]:
    """A TIFF of 16-bit grey whose white is 0, declared as one whose black is 0, and whether its samples are inverted.

    Pillow reads such files without inverting them, and not at all if they are big-endian.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return data, False
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, directory)
    shorts = {}  # tag: (position, value)
    for at in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", data, at)
        shorts[tag] = at + 8, value
    at, photometric = shorts.get(_PHOTOMETRIC, (0, None))
    if photometric != 0 or shorts.get(_BITS, (0, None))[1] != 16:
        return data, False
    return data[:at] + struct.pack(f"{order}H", 1) + data[at + 2 :], True


def _read_metadata(image: Image.Image, extra: list[png.Chunk], picture: Picture) -> None:
    """Fills the picture's metadata from Pillow's and from the chunks of a PNG file; orientation is not kept."""
    info = image.info
    if image.format == "PNG":
        _read_chunks(extra, info, picture)
    found = {
        "colour profile": info.get("icc_profile"),
        "resolution": info.get("dpi"),
        "EXIF": _exif(image),
        "XMP": _ORIENTATION.sub(b"", info.get("xmp") or b""),
        "comment": info.get("comment") if image.format in ("JPEG", "MPO", "GIF") else None,
    }
    picture.metadata |= {name: value for name, value in found.items() if value}


def _read_chunks(extra: list[png.Chunk], info: dict[str | tuple[int, int], Any], picture: Picture) -> None:
    """Puts what Pillow would read of these chunks into `info`, without its limits, and the rest into the metadata."""
    names, texts = {name for name, _ in extra}, []
    for name, body in extra:
        if name == b"iCCP":
            info["icc_profile"] = png.inflate(body.partition(b"\0")[2][1:])
            if info["icc_profile"] is None:
                picture.notes.append("drops the colour profile: it is damaged or larger than 64 MB")
        elif name == b"pHYs" and len(body) == 9 and body[8] == 1:
            info["dpi"] = tuple(round(n * 0.0254, 2) for n in struct.unpack(">II", body[:8]))
        elif entry := png.text((name, body)):
            keyword, value = entry
            if keyword == "XML:com.adobe.xmp" and value:
                info["xmp"] = value.encode()
            elif keyword == "Raw profile type exif" and value:
                info[keyword] = value
            else:
                texts.append((name, body))
    if texts:
        picture.metadata["text"] = texts
    coded = b"cICP" in names
    if coded:
        picture.metadata["CICP"] = [chunk for chunk in extra if chunk[0] == b"cICP"]
    gamma = dict(extra).get(b"gAMA", b"")
    plain = not gamma or abs(int.from_bytes(gamma, "big") - _SRGB_GAMMA) < 500
    if not plain and not coded and not names & {b"sRGB", b"iCCP"}:
        picture.metadata["gamma"] = [chunk for chunk in extra if chunk[0] in (b"gAMA", b"cHRM")]


def _exif(image: Image.Image) -> Image.Exif | None:
    """The EXIF data that remain valid after editing: without orientation, thumbnail and the file's structure."""
    try:
        found = image.getexif()
        kept = Image.Exif()
        for tag, value in found.items():
            if ExifTags.TAGS.get(tag) in _EXIF:
                kept[tag] = value
        for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            if entries := found.get_ifd(part):
                kept.get_ifd(part).update(entries)
        return kept if kept.tobytes() != Image.Exif().tobytes() else None
    except DAMAGED:
        return None
