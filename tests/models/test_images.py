"""Reading and writing pictures: what the files of every format and depth mean, and what is kept of them."""

import io
import struct
import warnings
import zlib

import numpy
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from inr_kernels.models.data import images
from inr_kernels.models.data.images import png

GREY, RGB = (
    numpy.arange(30, dtype=numpy.uint8).reshape(6, 5) * 8,
    numpy.random.default_rng(0).integers(256, size=(6, 5, 3), dtype=numpy.uint8),
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def read(data):
    return images.read(data, 1e6)


def values(tensor, top=255):
    return (tensor[0].permute(1, 2, 0) * top).round().int()


def file(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_file(samples, depth, colour, *extra):
    """A PNG by its specification; samples [h, w, channels]."""
    height, width, channels = samples.shape
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(numpy.uint8)
    elif depth == 8:
        rows = samples.reshape(height, -1).astype(numpy.uint8)
    else:
        bits = (samples.reshape(height, -1, 1) >> numpy.arange(depth)[::-1]) & 1
        rows = numpy.packbits(bits.reshape(height, -1).astype(numpy.uint8), 1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return png.SIGNATURE + b"".join(chunk(*c) for c in chunks)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("keyed", [False, True])
def test_grey_png_of_every_depth(depth, keyed):
    top = 2**depth - 1
    samples = numpy.random.default_rng(1).integers(top, size=(6, 5, 1), endpoint=True)
    key = int(samples[2, 3, 0])
    picture = read(png_file(samples, depth, 0, *([(b"tRNS", struct.pack(">H", key))] if keyed else [])))
    expected = torch.from_numpy(samples / top).float().permute(2, 0, 1)[None]
    torch.testing.assert_close(picture.colour, expected, rtol=0, atol=1e-6)
    assert picture.depth == (16 if depth == 16 else 8)
    if keyed:
        assert torch.equal(picture.alpha, torch.from_numpy(samples != key).float().permute(2, 0, 1)[None])
    else:
        assert picture.alpha is None


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("keyed", [False, True])
def test_rgb_png_of_every_depth(depth, keyed):
    top = 2**depth - 1
    samples = numpy.random.default_rng(1).integers(top, size=(6, 5, 3), endpoint=True)
    extra = [(b"tRNS", struct.pack(">HHH", *map(int, samples[2, 3])))] if keyed else []
    picture = read(png_file(samples, depth, 2, *extra))
    assert torch.equal(values(picture.colour, top), torch.from_numpy(samples).int())
    if keyed:
        assert picture.alpha.sum() == 29 and picture.alpha[0, 0, 2, 3] == 0
    else:
        assert picture.alpha is None


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_tiff_of_both_polarities_and_byte_orders(order, white_is_zero, bits):
    top = 2**bits - 1
    samples = numpy.random.default_rng(1).integers(top, size=(6, 5), endpoint=True)
    stored = (top - samples if white_is_zero else samples).astype(f"{order}u{bits // 8}").tobytes()
    tags = [(256, 5), (257, 6), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 8), (277, 1), (278, 6)]
    tags.append((279, len(stored)))
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(stored))
    data = head + stored + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    picture = read(data)
    assert torch.equal(values(picture.colour, top)[..., 0], torch.from_numpy(samples).int())
    assert picture.depth == bits


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I;16",
    "I",
    "F",
]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_every_format_is_read_as_pillow_shows_it(mode, kind):
    """Or refused, with a sentence, where a mode has no white."""
    image = Image.fromarray(RGB)
    image = image.convert("RGBA").convert(mode) if mode in ("RGBa", "La", "PA", "LA") and mode != "PA" else image
    if mode == "PA":
        image = image.convert("P").convert("PA")
    elif mode == "La":
        image = Image.fromarray(GREY).convert("LA").convert("La")
    elif mode in ("I;16",):
        image = Image.fromarray(GREY.astype(numpy.uint16) * 257)
    elif mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    elif image.mode != mode:
        image = image.convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {"sizes": [(5, 6)]} if kind == "ICO" else {}
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            data = file(image, kind, **options)
        with Image.open(io.BytesIO(data)) as again:
            again.load()
    except (OSError, ValueError, KeyError, SystemError):
        return  # Pillow does not write it, or not so that it can read it
    with Image.open(io.BytesIO(data)) as again:
        again.load()
        if again.mode == "F" or (again.mode == "I" and again.format != "PPM"):
            with pytest.raises(ValueError, match="32 bits per sample"):
                read(data)
            return
        if again.mode == "LAB":
            profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            shown = ImageCms.profileToProfile(again, *profiles, outputMode="RGB")
        elif again.mode.startswith("I"):
            shown = numpy.asarray(again) / 257
        else:
            shown = again.convert("RGBA" if again.has_transparency_data else "RGB")
    picture = read(data)
    parts = [picture.colour.expand(-1, 3, -1, -1)] + ([] if picture.alpha is None else [picture.alpha])
    got = torch.cat(parts, 1)[0].permute(1, 2, 0).numpy() * 255
    shown = numpy.asarray(shown, dtype=float)
    shown = shown[..., None] if shown.ndim == 2 else shown
    assert numpy.abs(got - shown).max() < 1
    header = images.read_header(data, 1e6)
    assert header == (*picture.colour.shape[2:], picture.alpha is not None)


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_tiffs_of_16_bits(channels):
    """Pillow reads and writes 8 bits of them, which is said."""
    samples = numpy.random.default_rng(0).integers(0, 65535, (5, 6, channels), dtype=numpy.uint16)
    made = io.BytesIO()
    tifffile.imwrite(made, samples if channels == 3 else samples[..., 0], photometric="rgb" if channels == 3 else None)
    picture = read(made.getvalue())
    lost = abs(picture.colour[0].permute(1, 2, 0).numpy() * 65535 - samples).max()
    if channels == 1:
        assert not picture.notes and lost < 1
    else:
        assert picture.notes == ["8 of its 16 bits a sample are read; those of a PNG are kept"] and lost < 257


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("depth", [8, 16])
def test_metadata_is_kept_or_named(suffix, depth):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    exif.get_ifd(0x8769)[0x829A] = 0.25  # exposure time
    exif.get_ifd(0x8769)[0xA002] = 99  # a width
    exif.get_ifd(0x8825)[1] = "N"
    data = file(
        Image.fromarray(RGB),
        "JPEG",
        exif=exif,
        dpi=(300, 300),
        icc_profile=SRGB,
        comment=b"a comment",
        xmp=b'<x tiff:Orientation="6"/>',
    )
    picture = read(data)
    picture.depth = depth
    assert picture.colour.shape == (1, 3, 5, 6), "upright"
    out, notes = images.encode(picture, suffix)
    kind = images.FORMATS[suffix]
    missing = {"colour profile", "resolution", "EXIF", "XMP", "comment"} - images.KEEPS[kind]
    expected = [f"{kind} cannot hold the picture's {', '.join(sorted(missing))}"] if missing else []
    if depth == 16 and kind != "PNG":
        expected.append(f"8 of the picture's 16 bits are written to {kind}; PNG keeps all")
    assert notes == expected
    again = read(out).metadata
    assert again.keys() == {"colour profile", "resolution", "EXIF", "XMP", "comment"} - missing or (
        kind == "PNG" and "text" in again
    )
    if "EXIF" not in missing:
        with Image.open(io.BytesIO(out)) as image:
            kept = image.getexif()
            assert 0x0112 not in kept or kept[0x0112] == 1
            assert kept[0x010F] == "maker" and kept.get_ifd(0x8825)[1] == "N"
            assert float(kept.get_ifd(0x8769)[0x829A]) == 0.25 and kept.get_ifd(0x8769)[0xA002] == 6
            assert image.info["icc_profile"] == SRGB and b"Orientation" not in picture.metadata["XMP"]
            if kind != "WEBP":
                assert [round(float(n)) for n in image.info["dpi"]] == [300, 300]


def test_chunks_of_a_png_stay():
    text = [(b"tEXt", b"Title\0a title"), (b"iTXt", b"Author\0\0\0\0\0" + "Jörg".encode())]
    gamma = [(b"gAMA", struct.pack(">I", 100000)), (b"cHRM", bytes(32))]
    data = png_file(RGB, 8, 2, *text, *gamma)
    picture = read(data)
    assert picture.metadata == {"text": text, "gamma": gamma}
    assert png.split(images.encode(picture, ".png")[0])[1] == gamma + text
    assert images.encode(picture, ".webp")[1] == ["WEBP cannot hold the picture's gamma, text"]
    coded = read(png_file(RGB, 8, 2, (b"cICP", b"\x09\x10\0\1"), *gamma))
    assert coded.metadata == {"CICP": [(b"cICP", b"\x09\x10\0\1")]}
    assert read(png_file(RGB, 8, 2, (b"gAMA", struct.pack(">I", 45455)))).metadata == {}


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_large_text_and_profiles_do_not_stop_a_picture(name):
    large = numpy.random.default_rng(0).integers(97, 123, 3 << 20, dtype=numpy.uint8).tobytes()
    body = {
        b"tEXt": b"Key\0" + large,
        b"zTXt": b"Key\0\0" + zlib.compress(large),
        b"iTXt": b"Key\0\1\0\0\0" + zlib.compress(large),
        b"iCCP": b"Key\0\0" + zlib.compress(large),
    }[name]
    picture = read(png_file(RGB, 8, 2, (name, body)))
    assert torch.equal(values(picture.colour), torch.from_numpy(RGB).int())
    bomb = zlib.compress(bytes(100 << 20))
    picture = read(png_file(RGB, 8, 2, (b"iCCP", b"Key\0\0" + bomb), (b"zTXt", b"Key\0\0" + bomb)))
    assert picture.notes == ["drops the colour profile: it is damaged or larger than 64 MB"]


def test_cmyk_is_converted_by_its_profile():
    image = Image.fromarray(RGB).convert("CMYK")
    picture = read(file(image, "TIFF"))
    assert picture.notes == ["converts CMYK without a colour profile to RGB by a formula"]
    picture = read(file(image, "TIFF", icc_profile=SRGB))  # a profile of another kind of colour
    assert picture.notes == ["converts CMYK to RGB by a formula: its colour profile cannot be used"]
    assert "colour profile" not in picture.metadata


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no picture at all", "not a picture in a format that is read: PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC pictures need pillow-heif"),
        (b"II*\0\xff\xff\xff\xff", "the input: "),
        (b"II*\0\x08\0\0\0\xff\xff", "the input: "),
        (png.SIGNATURE, "the input: "),
        (png.SIGNATURE + b"\xff\xff\xff\xffIHDR", "the input: "),
    ],
)
def test_other_files_raise_value_error(data, reason):
    with pytest.raises(ValueError, match=reason):
        read(data)


def test_errors_do_not_control_the_terminal(tmp_path):
    path = tmp_path / "\x1b[31mred.png"
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"\\x1b\[31mred\.png: not a picture") as raised:
        read(path)
    assert str(raised.value).isprintable()
