"""The help, and the commands info and demo."""

import re

import numpy
import pytest
from command_line import assert_refused, run
from PIL import Image

from inr_kernels._core.dispatch import OPS
from inr_kernels.cli import arguments, demo, networks
from inr_kernels.models import LIIF, Inpainter, Network
from inr_kernels.models.data import images
from inr_kernels.models.data.masks import KINDS
from inr_kernels.models.data.photographs import HELD_OUT, photographs
from inr_kernels.models.evaluation.fitting import FITS
from inr_kernels.models.evaluation.metrics import CONVENTIONS
from inr_kernels.models.evaluation.samples import PRESETS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs each test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_empty_command_line_shows_the_help(capsys):
    assert run() == 0
    shown = capsys.readouterr()
    assert run("--help") == 0
    assert shown == capsys.readouterr() and "usage: inr-kernels" in shown.out


def test_the_help_names_what_exists():
    """`arguments` repeats what modules define that import torch."""
    assert {f".{name}" for name in arguments.FORMATS} == {*images.FORMATS}
    assert {*arguments.BACKENDS} == {*OPS["local_implicit"].backends}
    for command, kind in (("upscale", LIIF), ("inpaint", Inpainter), ("export", Network), ("evaluate", Network)):
        ours = [name for name, network in networks.NETWORKS.items() if issubclass(network, kind)]
        assert arguments.NETWORKS[command] == tuple(ours)
    assert tuple(CONVENTIONS) == arguments.CONVENTIONS
    assert tuple(PRESETS) == arguments.PRESETS
    assert tuple(FITS) == arguments.FITS
    assert tuple(KINDS) == arguments.MASKS
    assert all(re.search(rf"\b{kind}\b", arguments.EVALUATE) for kind in KINDS)


def test_info(capsys):
    assert run("info") == 0
    out = capsys.readouterr().out
    for word in ("inr_kernels", "torch", "triton", "threads", "CUDA archs"):
        assert re.search(rf"^{word} +\S", out, re.MULTILINE)
    assert re.search(r"local_implicit on cpu, float32\n +cpu +runs  <- default\n", out)


@pytest.mark.parametrize("name", ["reference", "triton", "foo"])
def test_info_marks_the_requested_backend(capsys, monkeypatch, name):
    monkeypatch.setenv("INR_KERNELS_BACKEND", name)
    assert run("info") == 0
    out = capsys.readouterr().out
    marked = re.findall(r"^  (\w+) .*<- (.*)$", out, re.MULTILINE)
    assert marked == [(name, "requested by INR_KERNELS_BACKEND")] * len(OPS)
    assert f"\nINR_KERNELS_BACKEND {name}\n" in out


def test_demo(capsys, folder, monkeypatch):
    """With a smaller photograph; every panel shows something."""
    (photo,) = photographs(HELD_OUT)
    monkeypatch.setattr(demo, "photographs", lambda name: [photo.resize((200, 133))])
    monkeypatch.setattr(demo, "PART", (0, 0, 192, 128))
    assert run("demo", "-o", "demo.png", "--scale", "4.5", "--repeat", "1") == 0
    out = capsys.readouterr().out
    fill, upscale = out.split("\n\nEnlarge")
    for job, baseline in ((fill, "smooth fill, bicubic"), (upscale, "bicubic")):
        for line in (r"plain PyTorch +[\d.]+ +1.0x", r"fused kernels +[\d.]+ +[\d.]+x", f"{baseline} .* dB"):
            assert re.search(rf"^{line}", job, re.MULTILINE)
        assert float(re.search(r"Largest difference.*: (\S+)", job)[1]) < 2e-6
    with Image.open("demo.png") as image:
        sheet = numpy.asarray(image)
    panels = [part for row in numpy.array_split(sheet, 3) for part in numpy.array_split(row, 3, 1)]
    assert len(panels) == 9 and all(panel.std() > 9 for panel in panels)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--scale", "0.5"), 2, "must be 1 to 50; got 0.5"),
        (("-o", "demo.doc"), 2, "output must end in"),
        (("-o", "none/demo.png"), 1, "none/demo.png: the folder of the output does not exist"),
    ],
)
def test_demo_errors(capsys, words, status, message):
    assert_refused(capsys, status, message, "demo", *words)
