"""The command inr-kernels: pictures it reads and writes, errors, interruption."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import zlib

import numpy
import pytest
import torch
from command_line import assert_refused, run
from PIL import Image

from inr_kernels import cli
from inr_kernels.cli import pictures
from inr_kernels.models.data import images


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs each test in an empty folder and restores the number of threads."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def noise(*shape, dtype=numpy.uint8):
    top = numpy.iinfo(dtype).max
    smooth = numpy.random.default_rng(0).integers(top // 4, 3 * top // 4, shape, endpoint=True)
    return smooth.astype(dtype)


EIGHT = {
    "L": noise(6, 5),
    "LA": noise(6, 5, 2),
    "RGB": noise(6, 5, 3),
    "RGBA": noise(6, 5, 4),
}


@pytest.mark.parametrize("mode", EIGHT)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg", "bmp"])
def test_formats(mode, suffix):
    Image.fromarray(EIGHT[mode]).save("in.png")
    opaque = suffix in ("jpg", "bmp") and "A" in mode
    assert run("upscale", "in.png", "--scale", "2.5", "-o", f"out.{suffix}") == opaque
    if not opaque:
        with Image.open(f"out.{suffix}") as image:
            assert image.size == (12, 15)  # 12.5 is rounded to even
            colours = {"webp": {"L": "RGB", "LA": "RGBA"}}.get(suffix, {})
            assert image.mode == colours.get(mode, mode)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tif", "gif"])
def test_reads(suffix):
    Image.fromarray(EIGHT["RGB"]).save(f"in.{suffix}")
    assert run("upscale", f"in.{suffix}", "--size", "10x9", "-o", "out.png") == 0
    with Image.open("out.png") as image:
        assert image.size == (10, 9) and image.mode == "RGB"


def test_the_output_is_the_output_of_the_model():
    from inr_kernels.models import LIIF

    Image.fromarray(EIGHT["RGBA"]).save("in.png")
    run("upscale", "in.png", "--scale", "3", "-o", "out.png")
    out = images.read("out.png", 1e6)
    picture = images.read("in.png", 1e6)
    expected = LIIF.pretrained().upscale(picture.colour, 3)
    torch.testing.assert_close(out.colour, expected, rtol=0, atol=0.51 / 255)
    alpha = torch.nn.functional.interpolate(picture.alpha, scale_factor=3, mode="bicubic")
    torch.testing.assert_close(out.alpha, alpha.clamp(0, 1), rtol=0, atol=0.51 / 255)


def test_grey_stays_grey():
    """A grey input gives the same output as its RGB copy."""
    Image.fromarray(EIGHT["L"]).save("grey.png")
    Image.fromarray(EIGHT["L"]).convert("RGB").save("rgb.png")
    for name in ("grey", "rgb"):
        run("upscale", f"{name}.png", "--scale", "2", "-o", f"{name}2.png")
    grey, rgb = (images.read(f"{name}2.png", 1e6).colour for name in ("grey", "rgb"))
    torch.testing.assert_close(grey, rgb.mean(1, keepdim=True), rtol=0, atol=1.1 / 255)


@pytest.mark.parametrize(("mode", "expected"), [("P", "RGB"), ("1", "L"), ("CMYK", "RGB"), ("PA", "RGBA")])
def test_converted_modes(mode, expected):
    if mode == "PA":
        image = Image.fromarray(EIGHT["RGB"]).quantize(7)
        image.save("in.png", transparency=0)
    else:
        image = Image.fromarray(EIGHT["RGB"]).convert(mode)
        image.save("in.tif" if mode == "CMYK" else "in.png")
    source = "in.tif" if mode == "CMYK" else "in.png"
    assert run("upscale", source, "--scale", "2", "-o", "out.png") == 0
    with Image.open("out.png") as image:
        assert image.mode == expected


def deep_png(samples):
    """The bytes of a 16-bit PNG, unfiltered, written as the specification says."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").reshape(height, -1).view(numpy.uint8)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits(channels, folder):
    samples = noise(6, 5, channels, dtype=numpy.uint16)
    (folder / "in.png").write_bytes(deep_png(samples))
    picture = images.read("in.png", 1e6)
    parts = [picture.colour] + [picture.alpha] * (channels in (2, 4))
    read = torch.cat(parts, 1)[0].permute(1, 2, 0).double() * 65535
    torch.testing.assert_close(read.round(), torch.from_numpy(samples).double())
    images.write("copy.png", picture)
    again = images.read("copy.png", 1e6)
    assert again.depth == 16 and torch.equal(again.colour, picture.colour)
    assert channels in (1, 3) or torch.equal(again.alpha, picture.alpha)
    assert run("upscale", "in.png", "--scale", "2", "-o", "out.png") == 0
    out = images.read("out.png", 1e6)
    fine = (out.colour * 65535).round() % 257
    assert out.depth == 16 and out.colour.shape[2:] == (12, 10) and fine.unique().numel() > 9
    assert run("upscale", "in.png", "--scale", "2", "-o", "out.webp") == 0  # WebP has 8 bits only


def test_16_bit_tiff():
    Image.fromarray(noise(6, 5, dtype=numpy.uint16)).save("in.tif")
    assert run("upscale", "in.tif", "--scale", "2", "-o", "out.tif") == 0
    assert images.read("out.tif", 1e6).depth == 16


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    Image.fromarray(EIGHT["RGB"]).save(f"in.{suffix}", exif=exif)
    assert run("upscale", f"in.{suffix}", "--scale", "2", "-o", "out.png") == 0
    with Image.open("out.png") as image:
        assert image.size == (12, 10) and not image.getexif().get(0x0112)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("depth", [8, 16])
def test_colour_profile(suffix, depth, folder):
    from PIL import ImageCms

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = images.Picture(torch.rand(1, 3, 4, 5), depth=depth, metadata={"colour profile": icc})
    images.write(f"in.{suffix}", picture)
    run("upscale", f"in.{suffix}", "--scale", "2", "-o", f"out.{suffix}")
    with Image.open(f"out.{suffix}") as image:
        assert image.info["icc_profile"] == icc


@pytest.mark.parametrize(
    ("shape", "options", "size"),
    [
        ((1, 1, 3), ("--scale", "3.7"), (4, 4)),
        ((1, 40, 3), ("--scale", "1"), (40, 1)),
        ((3, 2, 3), ("--size", "17x3"), (17, 3)),
        ((5, 4, 3), ("--scale", "30"), (120, 150)),
    ],
)
def test_sizes(folder, shape, options, size):
    Image.fromarray(noise(*shape)).save("in.png")
    (folder / "out.png").write_text("older file")
    assert run("upscale", "in.png", *options, "-o", "out.png") == 0
    assert sorted(os.listdir()) == ["in.png", "out.png"]
    with Image.open("out.png") as image:
        assert image.size == size


def test_options(folder):
    from inr_kernels.models import LIIF, LIIFConfig

    LIIF(LIIFConfig(blocks=1, features=4, hidden=(8,))).save("tiny.safetensors")
    Image.fromarray(EIGHT["RGB"]).save("in.png")
    words = ["upscale", "in.png", "--scale", "2", "--model", "tiny.safetensors", "--threads", "3"]
    assert run(*words, "--workspace", "1", "--backend", "reference", "-o", "a.png") == 0
    assert torch.get_num_threads() == 3
    assert run(*words, "--backend", "cpu", "-o", "b.png") == 0
    a, b = (images.read(name, 1e6).colour for name in ("a.png", "b.png"))
    torch.testing.assert_close(a, b, rtol=0, atol=1.1 / 255)


@pytest.mark.parametrize("scale", ["nan", "inf", "-2", "0", "two", "1e999"])
def test_invalid_scale(capsys, scale):
    message = f"argument --scale: must be a positive finite number; got {scale}"
    assert_refused(capsys, 2, message, "upscale", "in.png", f"--scale={scale}", "-o", "out.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "12"), "argument --size: must be WIDTHxHEIGHT, two positive integers such as 1920x1080; got 12"),
        (("--size", "0x9"), "argument --size: must be WIDTHxHEIGHT, .* got 0x9"),
        (("--size", "20x"), "argument --size: must be WIDTHxHEIGHT, .* got 20x"),
        (("--scale", "2", "--size", "9x9"), "not allowed with"),
        ((), "one of the arguments --scale --size is required"),
        (("--scale", "0.5"), "argument --scale: must be at least 1; got 0.5"),
        (("--scale", "2", "--recursive"), "argument --recursive: applies where the output is a folder"),
        (("--size", "9x4"), "output must not be smaller than the input's 5x6; got --size 9x4"),
        (("--scale", "2", "--backend", "abacus"), "invalid choice: 'abacus'"),
        (("--scale", "2", "--threads", "0"), "must be a positive integer; got 0"),
        (("--scale", "2", "--threads", "9" * 400), "must be a positive integer; got 9"),
        (("--scale", "2", "--workspace", "x"), "must be a positive integer; got x"),
        (("--scale", "2", "-o", "out.xcf"), "output must end in .png .* got out.xcf"),
        (("--scale", "2", "-o", "in.png"), "output must be another file than the input"),
        (("--size", "40000x6", "--workspace", "1"), "argument --workspace: must be at least 2 for these sizes; got 1"),
        (("--scale", "2", "--model", "lif"), "argument --model: must be liif or the path of a checkpoint; got lif"),
        (("--scale", "2", "--model", "Dear"), ".* got Dear [(]inr-kernels inpaint takes it[)]"),
        (("--scale", "2", "--max-memory", "0"), "argument --max-memory: must be a positive finite number; got 0"),
    ],
)
def test_wrong_command_lines(capsys, words, message):
    Image.fromarray(EIGHT["RGB"]).save("in.png")
    before = (os.stat("in.png").st_mtime_ns, os.stat("in.png").st_size)
    assert_refused(capsys, 2, message, "upscale", "in.png", "-o", "out.png", *words)
    assert before == (os.stat("in.png").st_mtime_ns, os.stat("in.png").st_size)


@pytest.mark.parametrize("words", [("upscale",), ("enlarge",)])
def test_no_command(capsys, words):
    assert_refused(capsys, 2, "", *words)


@pytest.mark.parametrize("name", ["liif", "LIIF"])
def test_the_name_of_the_network_has_any_case(name):
    Image.fromarray(EIGHT["RGB"]).save("in.png")
    assert run("upscale", "in.png", "--scale", "2", "--model", name, "-o", "out.png") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.png",), "none.png: No such file or directory"),
        (("none", "-o", "x"), "input none: No such file or directory"),
        (("text.png",), "text.png: not a picture in a format that is read: PNG, JPEG"),
        (("empty.png",), "empty.png: the file is empty"),
        (("cut.png",), "cut.png: .*(truncated|broken)"),
        (("cut.jpg",), "cut.jpg: .*truncated"),
        (("float.tif",), "float.tif: .* with 32 bits"),
        (("in.png", "-o", "no/out.png"), "no/out.png: the folder of the output does not exist"),
        (("in.png", "--model", "none.pth"), "none.pth: No such file or directory"),
        (("in.png", "--model", "text.png"), "text.png is not a DEAR, .* or LIIF checkpoint"),
        (("in.png", "--max-megapixels", "1e-5"), "5 x 6 .* limit of 1e-05 .*--max-megapixels"),
        (("rgba.png", "-o", "out.jpg"), "JPEG holds no transparency"),
        (("in.png", "--scale", "4000", "-o", "o.webp"), "WEBP holds at most 16383 pixels a side"),
        (("folder.png", "-o", "large"), "folder.png: holds no pictures; --recursive searches subfolders"),
        (("n*.png", "-o", "large"), "input n[*].png: no file has this pattern"),
        (("in.png", "--scale", "1e6"), "5000000x6000000 from an input of 5x6 needs about .* GB of memory, .* are free"),
        (("in.png", "--scale", "1e300"), "needs about .* GB of memory"),
    ],
)
def test_errors(capsys, folder, words, message):
    for mode, name in (("RGB", "in.png"), ("RGBA", "rgba.png")):
        Image.fromarray(EIGHT[mode]).save(name)
    (folder / "folder.png").mkdir()
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    Image.fromarray(numpy.zeros((4, 4), numpy.float32)).save("float.tif")
    for name in ("cut.png", "cut.jpg"):
        Image.fromarray(noise(90, 80, 3)).save(name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    before = sorted(os.listdir())
    assert_refused(capsys, 1, message, "upscale", "-o", "out.png", "--scale", "2", *words)
    assert sorted(os.listdir()) == before


def test_backend_that_cannot_run(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    Image.fromarray(EIGHT["RGB"]).save("in.png")
    words = ("upscale", "in.png", "--scale", "2", "-o", "out.png", "--backend", "triton")
    assert_refused(capsys, 1, "backend 'triton' cannot run local_implicit: it takes CUDA tensors", *words)


def test_no_gpu(capsys, monkeypatch):
    Image.fromarray(EIGHT["RGB"]).save("in.png")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("upscale", "in.png", "--scale", "2", "-o", "out.png", "--device", "cuda")
    assert_refused(capsys, 1, "--device cuda: PyTorch finds no GPU", *words)


def test_pillows_own_limit_does_not_interfere(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    Image.fromarray(EIGHT["RGB"]).save("in.png")
    assert run("upscale", "in.png", "--scale", "2", "-o", "out.png") == 0
    assert Image.MAX_IMAGE_PIXELS == 1


def test_says_that_it_uses_one_frame(capsys):
    frames = [Image.fromarray(EIGHT["RGB"] // n) for n in (1, 2)]
    frames[0].save("in.gif", save_all=True, append_images=frames[1:])
    assert run("upscale", "in.gif", "--scale", "2", "-o", "out.png") == 0
    assert "in.gif: has 2 frames; using the first" in capsys.readouterr().err


def test_more_memory_than_the_limit(capsys, monkeypatch):
    """Is refused before the picture is decoded; an option lifts the limit."""
    Image.new("1", (9000, 9000)).save("huge.png")
    monkeypatch.setattr(images, "read", None)
    monkeypatch.setattr(pictures, "free_memory", lambda: 99 << 30)
    words = ("upscale", "huge.png", "--scale", "1.5", "-o", "out.png")
    message = "13500x13500 from an input of 9000x9000 needs about 18.0 GB of memory, more than the limit of 16 GB; "
    assert_refused(capsys, 1, message + "--max-memory raises it", *words)
    with pytest.raises(TypeError):  # decodes it
        cli.main([*words, "--max-memory", "18.1"])


def test_progress_reaches_the_end(monkeypatch):
    bars = []

    class Bar(pictures.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False})

        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(pictures, "tqdm", Bar)
    Image.fromarray(EIGHT["RGB"]).save("in.png")
    run("upscale", "in.png", "--scale", "7", "-o", "out.png")
    assert bars[0] == (1, 1)


def test_a_failed_write_keeps_the_older_file(capsys, folder, monkeypatch):
    def replace(source, target):
        raise OSError(28, "No space left on device", source, target)

    Image.fromarray(EIGHT["RGB"]).save("in.png")
    (folder / "out.png").write_text("older")
    monkeypatch.setattr(os, "replace", replace)
    assert_refused(capsys, 1, "out.png: No space left", "upscale", "in.png", "--scale", "2", "-o", "out.png")
    assert (folder / "out.png").read_text() == "older"
    assert sorted(os.listdir()) == ["in.png", "out.png"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_interrupted_half_way(folder, sent, status):
    """A job of some minutes is interrupted as soon as the progress bar on the terminal shows some progress."""
    Image.fromarray(noise(200, 200, 3)).save("in.png")
    (folder / "out.png").write_text("older")
    words = ["upscale", "in.png", "--scale", "20", "-o", "out.png", "--workspace", "32"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    # A process in the background of a shell inherits that SIGINT is ignored.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program += "; from inr_kernels.cli import main; main(sys.argv[1:])"
    with subprocess.Popen([sys.executable, "-c", program, *words], stderr=theirs) as process:
        os.close(theirs)
        shown, end = b"", time.monotonic() + 60
        while not re.search(rb"[1-9]\d*%", shown) and time.monotonic() < end:
            with contextlib.suppress(OSError):
                shown += os.read(ours, 4096)
        process.send_signal(sent)
        assert process.wait(30) == status
    os.close(ours)
    assert (folder / "out.png").read_text() == "older"
    assert sorted(os.listdir()) == ["in.png", "out.png"]


def test_an_unknown_backend_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("INR_KERNELS_BACKEND", "foo")
    Image.fromarray(EIGHT["RGB"]).save("in.png")
    message = r"got 'foo' \(as in the environment variable INR_KERNELS_BACKEND\)"
    assert_refused(capsys, 1, message, "upscale", "in.png", "--scale", "2", "-o", "out.png")
