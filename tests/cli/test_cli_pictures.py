"""What the command makes of a picture's transparency and a mask, and how it behaves in unusual processes."""

import os
import signal
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from PIL import Image

from inr_kernels import cli
from inr_kernels.cli import pictures
from inr_kernels.models.data import images

RGB = numpy.random.default_rng(0).integers(0, 255, (9, 14, 3), numpy.uint8)
HOLES = numpy.zeros((9, 14), numpy.uint8)
HOLES[2:6, 3:11] = 255


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs each test in its own folder with an image and its mask."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(RGB).save("in.png")
    Image.fromarray(HOLES).save("mask.png")
    return tmp_path


NO_HOLE = "the mask has no hole: its largest value is"
STROKES = numpy.stack((HOLES, HOLES * 0, HOLES * 0, HOLES), -1)  # red on a transparent layer
GREY = RGB[..., 0]


def inpaint(mask, output="out.png"):
    cli.main(["inpaint", "in.png", "--mask", mask, "-o", output, "--model", "in2"])


def test_a_mask_drawn_in_the_alpha_channel():
    strokes = numpy.full((9, 14, 4), 255, numpy.uint8)
    strokes[..., 3] = HOLES
    Image.fromarray(strokes).save("alpha.png")
    inpaint("mask.png", "a.png")
    inpaint("alpha.png", "b.png")
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert numpy.array_equal(a, b) and numpy.array_equal(numpy.asarray(a)[HOLES == 0], RGB[HOLES == 0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (HOLES // 255, f"{NO_HOLE} 1 of 255; pixels are filled from 128 on"),
        ((HOLES // 255).astype(numpy.uint16), f"{NO_HOLE} 1 of 65535; pixels are filled from 32768 on"),
        (HOLES * 0, f"{NO_HOLE} 0 of 255; pixels are filled from 128 on"),
        (STROKES, f"{NO_HOLE} 85 of 255 (brightness times opacity); pixels are filled from 128 on"),
        (GREY, "80 % of the mask is grey, as of a photograph; pixels are filled from 128 on"),
        (HOLES * 0 + 200, "the mask covers the whole image: its smallest value is 200 of 255"),
    ],
)
def test_a_mask_of_one_kind_is_named(capsys, mask, message):
    Image.fromarray(mask).save("other.png")
    inpaint("other.png")
    assert capsys.readouterr().err == f"inr-kernels: other.png: {message}\n"


def test_hidden_colours_do_not_reach_visible_pixels():
    rows, cols = numpy.mgrid[:24, :24]
    disk = numpy.zeros((24, 24, 4), numpy.uint8)
    disk[numpy.hypot(rows - 11.5, cols - 11.5) < 8] = (230, 40, 40, 255)
    Image.fromarray(disk).save("disk.png")
    cli.main(["upscale", "disk.png", "--scale", "3", "-o", "out.png"])
    with Image.open("out.png") as image:
        out = numpy.asarray(image).astype(int)
    visible = out[..., 3] > 0
    assert visible.sum() > 1500
    assert numpy.abs(out[visible][:, :3] - (230, 40, 40)).max() <= 30


def test_hidden_colours_stay_at_the_same_size():
    hidden = numpy.dstack((RGB, HOLES))
    Image.fromarray(hidden).save("in.png")
    Image.fromarray(numpy.roll(HOLES, 3, 1)).save("other.png")
    inpaint("other.png")
    with Image.open("out.png") as image:
        kept = numpy.roll(HOLES, 3, 1) == 0
        assert numpy.array_equal(numpy.asarray(image)[kept], hidden[kept])


def test_what_the_output_cannot_hold_is_named(capsys):
    with Image.open("in.png") as image:
        image.save("in.jpg", comment=b"a comment", dpi=(300, 300))
    cli.main(["upscale", "in.jpg", "--scale", "2", "-o", "out.webp"])
    assert capsys.readouterr().err == "inr-kernels: out.webp: WEBP cannot hold the picture's comment, resolution\n"


def test_a_private_file_stays_private():
    inpaint("mask.png")
    os.chmod("out.png", 0o600)
    inpaint("mask.png")
    assert os.stat("out.png").st_mode & 0o777 == 0o600


def test_in_a_thread():
    thread = threading.Thread(target=inpaint, args=("mask.png",))
    thread.start()
    thread.join()
    assert os.path.exists("out.png")


def test_signal_handlers_are_restored():
    before = signal.signal(signal.SIGTERM, lambda *_: None), signal.getsignal(signal.SIGHUP)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        inpaint("mask.png")
        assert signal.getsignal(signal.SIGTERM) is mine and signal.getsignal(signal.SIGHUP) == before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """As under `nohup`."""
    before, during = signal.signal(signal.SIGHUP, signal.SIG_IGN), []
    read = pictures.read

    def watched(*args):
        during.append(signal.getsignal(signal.SIGHUP))
        return read(*args)

    monkeypatch.setattr(pictures, "read", watched)
    try:
        inpaint("mask.png")
        assert {*during, signal.getsignal(signal.SIGHUP)} == {signal.SIG_IGN}
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("variables", [{}, {"PYTHONOPTIMIZE": "2"}])
def test_as_a_module_without_stderr_or_docstrings(variables):
    words = [sys.executable, "-m", "inr_kernels", "inpaint", "in.png", "--mask", "mask.png", "-o", "out.png"]
    closed = ["sh", "-c", 'exec "$0" "$@" 2>&-', *words, "--model", "in2"]
    done = subprocess.run(closed, env=os.environ | variables, check=False)
    assert done.returncode == 0
    out = images.read("out.png", 1e6).colour
    assert torch.equal(
        (out * 255).round().byte()[0, :, HOLES == 0], torch.from_numpy(RGB.copy()).permute(2, 0, 1)[:, HOLES == 0]
    )
