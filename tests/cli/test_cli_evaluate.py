"""The command evaluate."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from command_line import assert_refused, run
from PIL import Image

from inr_kernels.cli import evaluate
from inr_kernels.models import IN2, LIIF, IN2Config, LIIFConfig
from inr_kernels.models.evaluation import perceptual


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder with pictures, masks, another program's outputs and networks."""
    monkeypatch.chdir(tmp_path)
    rng = numpy.random.default_rng(0)
    for name in ("in", "masks", "out"):
        os.mkdir(name)
    for name in ("a.png", "b.jpg"):
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=numpy.uint8)
        mask = numpy.zeros((24, 32), numpy.uint8)
        mask[4:10, 6:20] = 255
        for to, array in (("in", pixels), ("masks", mask), ("out", numpy.where(mask[..., None] > 0, 128, pixels))):
            Image.fromarray(array.astype(numpy.uint8)).save(f"{to}/{name}", quality=100)
    IN2(IN2Config(channels=(16, 16, 32), blocks=1, hidden=(32, 32))).save("small.safetensors")
    LIIF(LIIFConfig(blocks=1, features=8, hidden=(16,))).save("liif.safetensors")
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def table(text):
    """{setting and method: values} of the first table in Markdown."""
    lines = [re.split(r" *\| *", line)[1:-1] for line in text.split("\n\n")[1].splitlines()]
    assert lines[0][-1] == "pictures"
    columns = sum(not re.search("[↑↓]|pictures", head) for head in lines[0])
    return {", ".join(line[:columns]): line[columns:] for line in lines[2:]}


def test_networks_on_drawn_masks(capsys, monkeypatch):
    """A damaged picture is named, and the rest goes on. A terminal shows a progress bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Path("in/c.png").write_bytes(b"junk")
    words = ("evaluate", "--model", "small.safetensors", "--data", "in", "--masks", "strokes:30", "-o", "new/results")
    assert run(*words, "--threads", 1) == 0
    out, err = capsys.readouterr()
    assert err.count("in/c.png: not a picture in a format that is read") == 1 and "3/3" in err
    assert [*table(out)] == ["small", "mean colour", "smooth fill", "Telea"]
    assert all(values[-1] == "2" for values in table(out).values())
    assert "Convention: RGB" in out and "Masks: strokes:30, drawn with seed 0." in out
    written = {path.name: path for path in Path("new/results").iterdir()}
    assert {*written} == {"table.md", "table.csv", "pictures.csv", "plot.png"}
    assert written["table.md"].read_text() == out
    rows = written["pictures.csv"].read_text().splitlines()
    assert rows[0] == "case,method,picture,share,psnr,psnr_holes,ssim,l1" and len(rows) == 9
    assert run(*words, "--quiet") == 0
    assert capsys.readouterr().out == out, "masks depend on the name"


def test_outputs_of_another_program(capsys):
    Image.new("RGB", (5, 5)).save("out/d.png")
    os.remove("out/b.jpg")
    words = ("evaluate", "--pred", "out", "--target", "in", "--masks", "masks", "--convention", "lama", "--quiet")
    assert run(*words, "--no-baselines") == 0
    out, err = capsys.readouterr()
    assert [*table(out)] == ["out"] and table(out)["out"][-1] == "1"
    assert err.splitlines() == [
        "inr-kernels: in/b.jpg: has no partner in out",
        "inr-kernels: masks/b.jpg: belongs to no picture",
        "inr-kernels: out/d.png: belongs to no picture",
    ]
    a, b = (numpy.asarray(Image.open(f"{name}/a.png"), float) for name in ("in", "out"))
    assert float(table(out)["out"][0]) == pytest.approx(10 * numpy.log10(255**2 / ((a - b) ** 2).mean()), abs=0.01)
    assert run(*words) == 0
    assert [*table(capsys.readouterr().out)] == ["out", "mean colour", "smooth fill", "Telea"]


def test_scales(capsys):
    """LIIF without masks; with them, a network that fills and enlarges."""
    words = ("evaluate", "--data", "in", "--scales", "1.5,2", "--quiet", "--model")
    assert run(*words, "liif.safetensors", "--convention", "plain") == 0
    found = table(capsys.readouterr().out)
    assert [*found] == [f"×{scale}, {method}" for scale in (1.5, 2) for method in ("liif", "bicubic", "nearest")]
    IN2(IN2Config(channels=(16, 16, 32), blocks=1, hidden=(32, 32), any_size=True)).save("small.safetensors")
    assert run(*words, "small.safetensors", "--masks", "noise:20") == 0
    found = table(capsys.readouterr().out)
    assert "×2, small" in found and "×1.5, smooth fill, nearest" in found


def test_presets(capsys, monkeypatch):
    """They set the convention and draw strokes."""
    monkeypatch.setitem(evaluate.PRESETS, "in2", [evaluate.Case.of_size(size) for size in ((20, 24), (32, 18))])
    assert run("evaluate", "--data", "in", "--model", "small.safetensors", "--preset", "in2", "--quiet") == 0
    out = capsys.readouterr().out
    assert "IN²: as CoordFill" in out and "Masks: strokes," in out
    assert "20 × 24, small" in table(out) and "32 × 18, Telea" in table(out)


def test_perceptual_metrics(capsys, monkeypatch):
    """Their networks are read from the files given; another LPIPS than the convention's is named."""
    opened = []

    def network(name):
        class Fake(torch.nn.Module):
            net = "vgg"

            def __init__(self, path):
                super().__init__()
                opened.append((name, path))

            def forward(self, x, *other):
                return x.mean((1, 2, 3)) if other else x.mean((2, 3))

        return Fake

    for name in ("LPIPS", "Inception"):
        assert hasattr(perceptual, name)
        monkeypatch.setattr(evaluate, name, network(name))
    for name in ("vgg.pth", "inception.pth"):
        Path(name).touch()
    words = ("evaluate", "--data", "in", "--masks", "masks", "--lpips", "vgg.pth", "--fid", "inception.pth", "--quiet")
    assert run(*words) == 0
    out, err = capsys.readouterr()
    assert opened == [("LPIPS", "vgg.pth"), ("Inception", "inception.pth")]
    assert "vgg.pth: LPIPS of vgg, but this convention's tables have that of alex" in err
    assert "| LPIPS ↓ | FID ↓ |" in out and "–" not in out.split("\n\n")[1]


def test_telea_needs_opencv(capsys, monkeypatch):
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cv2" else spec(name))
    assert run("evaluate", "--data", "in", "--masks", "masks", "--quiet") == 0
    out, err = capsys.readouterr()
    assert [*table(out)] == ["mean colour", "smooth fill"]
    assert "without Telea's method, which needs OpenCV: pip install opencv-python-headless" in err


@pytest.mark.parametrize(
    ("status", "message", "words"),
    [
        (2, "nothing to compare: give --masks to fill holes, --scales to enlarge, or --pred", ()),
        (
            2,
            "argument --model: give --masks to fill holes, or --scales to enlarge",
            ("--model", "in2", "--pred", "out"),
        ),
        (2, "argument --masks: must be a folder or the kind of masks to draw; kind must", ("--masks", "dots")),
        (2, "argument --masks: must be a folder with --pred", ("--pred", "out", "--masks", "thin")),
        (2, "argument --pred: takes one of --scales at most", ("--pred", "out", "--scales", "2,3")),
        (2, "argument --model: liif enlarges and does not fill", ("--model", "liif", "--masks", "thin")),
        (2, "argument --scales: must be a positive finite number; got x", ("--scales", "2,x")),
        (2, "argument --scales: must be more than 1; got 0.5", ("--scales", "2,0.5")),
        (1, "nowhere: must be a folder of pictures", ("--data", "nowhere", "--masks", "masks")),
        (1, "nowhere.pth: No such file", ("--masks", "masks", "--lpips", "nowhere.pth")),
        (1, "in/a.png: is not a folder", ("--masks", "masks", "-o", "in/a.png")),
    ],
)
def test_errors(status, message, words, capsys):
    assert_refused(capsys, status, message, "evaluate", "--data", "in", *words)


@pytest.mark.parametrize("name", ["torchmetrics", "matplotlib"])
def test_packages_are_checked_before_the_work(name, capsys, monkeypatch):
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else spec(wanted))
    message = rf"evaluate needs {name}: pip install 'inr-kernels\[evaluate\]'"
    assert_refused(capsys, 1, message, "evaluate", "--data", "in", "--masks", "masks", "-o", "results")
    assert not os.path.exists("results")


def test_no_picture_is_left(capsys):
    for path in Path("in").iterdir():
        path.write_bytes(b"")
    assert run("evaluate", "--data", "in", "--masks", "thin", "--quiet") == 1
    assert capsys.readouterr().err.endswith("inr-kernels: in: no picture could be compared\n")


def test_labels():
    assert evaluate.labelled(["x/a.pt", "b.pt"], "file") == {"a": "x/a.pt", "b": "b.pt"}
    assert evaluate.labelled(["x/a.pt", "y/a.pt"], "file") == {"x/a.pt": "x/a.pt", "y/a.pt": "y/a.pt"}
    assert evaluate.labelled(["x/out/"], "folder") == {"out": "x/out/"}
