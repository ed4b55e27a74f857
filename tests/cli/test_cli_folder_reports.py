"""What a run over a folder says on stderr, and which mistakes end it before the first picture."""

import os

import pytest
from command_line import run
from test_cli_folders import enlarge, fill, folder, pixels, save, tree  # noqa: F401, folder runs in each test

from inr_kernels.models import LaMa, LaMaConfig
from inr_kernels.models.data import images


def test_an_empty_output_is_not_finished(capsys, folder):  # noqa: F811
    (folder / "large").mkdir()
    (folder / "large/a.png").touch()
    enlarge("photos", "-o", "large")
    assert capsys.readouterr().err == "inr-kernels: large: 3 written\n"
    assert pixels("large/a.png").shape == (18, 28, 3)


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_a_share_without_torchrun_is_named(monkeypatch, capsys, rank):
    """RANK and WORLD_SIZE may be left over from another program."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank:
        monkeypatch.setenv("RANK", rank)
    enlarge("photos", "-o", "large")
    count = 1 if rank == "1" else 2
    assert capsys.readouterr().err.splitlines() == [
        f"inr-kernels: RANK={rank or 0}, WORLD_SIZE=2: this process does {count} of the 3 pictures",
        f"inr-kernels: large: {count} written",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hd-strategy", "crop", "--scale", "2"], "argument --hd-strategy crop: works at the input's size only; got"),
        (["--refine", "--scale", "2"], "argument --refine: works at the input's size only; got --scale 2"),
        (["--scale", "0.5"], "argument --scale: must be at least 1; got 0.5"),
        (["--hd-strategy-crop-margin", "9"], "argument --hd-strategy-crop-margin: applies with --hd-strategy crop"),
        (["--model", "lama.safetensors", "--scale", "2"], "LaMa fills at the input's size only; got --scale 2"),
    ],
)
def test_mistakes_are_reported_once(capsys, words, message):
    LaMa(LaMaConfig(features=8, blocks=1)).save("lama.safetensors")
    assert run("inpaint", "photos", "--mask", "masks", "-o", "filled", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"inr-kernels: {message}") and not os.path.exists("filled")


def test_one_is_no_other_size():
    fill("photos", "--mask", "masks", "-o", "filled", "--hd-strategy", "crop", "--scale", "1")
    assert tree("filled") == ["a.png", "b.jpg", "c.png"]


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tif"])
def test_lost_bits_are_named(capsys, suffix):
    os.mkdir("deep")
    images.write("deep/a.png", images.Picture(images.read("photos/a.png", 1e6).colour, depth=16))
    enlarge("deep", "-o", "large", "--format", suffix)
    kind = images.FORMATS[f".{suffix}"]
    line = f"inr-kernels: large/a.{suffix}: 8 of the picture's 16 bits are written to {kind}; PNG keeps all"
    assert line in capsys.readouterr().err.splitlines()
    enlarge("deep", "-o", "png")
    assert "bits" not in capsys.readouterr().err and images.read("png/a.png", 1e6).depth == 16
