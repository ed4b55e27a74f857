"""The command inr-kernels inpaint."""

import functools
import os
import re

import numpy
import pytest
import torch
from PIL import Image

from inr_kernels import cli
from inr_kernels.cli import inpaint, pictures
from inr_kernels.models import (
    DEAR,
    IN2,
    LIIF,
    DEARConfig,
    FeatureRefiner,
    ImplicitAutoencoder,
    IN2Config,
    LaMa,
    LaMaConfig,
    LIIFConfig,
)
from inr_kernels.models.data import images

NETWORKS = {"dear": DEAR, "in2": IN2}
SAMPLES = numpy.random.default_rng(0).integers(0, 255, (9, 14, 4), numpy.uint8)
PICTURES = {"L": SAMPLES[..., 0], "LA": SAMPLES[..., :2], "RGB": SAMPLES[..., :3], "RGBA": SAMPLES}
HOLES = numpy.zeros((9, 14), numpy.uint8)
HOLES[2:6, 3:11] = 255


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs each test in its own folder with an image and its mask, and restores the number of threads."""
    monkeypatch.chdir(tmp_path)
    for mode, samples in PICTURES.items():
        Image.fromarray(samples).save(f"{mode}.png")
    Image.fromarray(HOLES).save("mask.png")
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def run(*words):
    """The exit status of `inr-kernels inpaint`."""
    try:
        cli.main(["inpaint", *map(str, words)])
    except SystemExit as end:
        return end.code
    return 0


def refused(capsys, status, message, *words):
    """The command ends with the status and one line on stderr, and writes nothing."""
    before = sorted(os.listdir())
    assert run(*words) == status
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"inr-kernels: .*{message}.*\n", err) and not out
    assert sorted(os.listdir()) == before


def pixels(path):
    with Image.open(path) as image:
        return numpy.asarray(image)


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("mode", PICTURES)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_known_pixels_do_not_change(model, mode, suffix):
    assert run(f"{mode}.png", "--mask", "mask.png", "--model", model, "-o", f"out.{suffix}") == 0
    out, known = pixels(f"out.{suffix}"), HOLES == 0
    assert out.shape == PICTURES[mode].shape and (out[known] == PICTURES[mode][known]).all()
    colours = slice(0, 3) if mode.startswith("RGB") else slice(0, 1)
    filled, had = (p.reshape(9, 14, -1)[~known][:, colours] for p in (out, PICTURES[mode]))
    assert (filled != had).mean() > 0.9
    assert filled.astype(float).std() < had.astype(float).std()  # noise cannot be predicted


@pytest.mark.parametrize(("name", "network"), NETWORKS.items())
def test_equals_the_models_inpaint(name, network):
    model = network.pretrained()
    picture = images.read("RGB.png", 1e6).colour
    mask = torch.from_numpy(HOLES / 255).float()[None, None]
    cases = ((), {}), (("--scale", "2.5"), {"scale": 2.5}), (("--size", "31x9"), {"size": (9, 31)})
    for words, options in cases if model.any_size else cases[:1]:
        assert run("RGB.png", "--mask", "mask.png", "--model", name, *words, "-o", "out.png") == 0
        expected = model.inpaint(picture, mask, **options)
        torch.testing.assert_close(images.read("out.png", 1e6).colour, expected, rtol=0, atol=0.51 / 255)


def test_transparency_is_upscaled():
    assert run("RGBA.png", "--mask", "mask.png", "--scale", "2", "-o", "out.png") == 0
    assert pixels("out.png").shape == (18, 28, 4)


def test_16_bits_are_kept():
    deep = images.Picture(torch.rand(1, 3, 9, 14), depth=16)
    images.write("deep.png", deep)
    assert run("deep.png", "--mask", "mask.png", "-o", "out.png") == 0
    had, out = images.read("deep.png", 1e6), images.read("out.png", 1e6)
    known = torch.from_numpy(HOLES == 0).expand(3, 9, 14)
    assert out.depth == 16 and torch.equal(out.colour[0][known], had.colour[0][known])


@pytest.mark.parametrize("values", [(127, 128), (0, 255), (100, 200)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_masks_are_thresholded_at_128(values, mode):
    grey = numpy.where(HOLES, values[1], values[0]).astype(numpy.uint8)
    Image.fromarray(grey).convert(mode).save("grey.png")
    for mask in ("mask", "grey"):
        run("RGB.png", "--mask", f"{mask}.png", "-o", f"{mask}_out.png")
    assert (pixels("mask_out.png") == pixels("grey_out.png")).all()


@pytest.mark.parametrize("value", [0, 255])
def test_a_mask_of_one_colour(value):
    Image.fromarray(numpy.full_like(HOLES, value)).save("mask.png")
    assert run("RGB.png", "--mask", "mask.png", "-o", "out.png") == 0
    assert (pixels("out.png") == PICTURES["RGB"]).all() == (value == 0)


def test_options(monkeypatch):
    config = DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, norm="none", hidden=(8,))
    DEAR(config).save("tiny.safetensors")
    words = ["RGB.png", "--mask", "mask.png", "--scale", "2", "--model", "tiny.safetensors", "--threads", "3"]
    assert run(*words, "--workspace", "1", "--backend", "reference", "-o", "a.png") == 0
    assert torch.get_num_threads() == 3
    assert run(*words, "--backend", "cpu", "-o", "b.png") == 0
    assert abs(pixels("a.png").astype(int) - pixels("b.png")).max() <= 1
    for tile in (0, 32, 4):  # the image fits into one tile of 32
        assert run(*words, "--tile", tile, "-o", f"tile{tile}.png") == 0
    assert (pixels("tile0.png") == pixels("tile32.png")).all() and (pixels("tile4.png") != pixels("tile32.png")).any()
    assert (pixels("tile0.png") == pixels("b.png")).all()  # the default
    assert run(*words[:-4], "--model", "dear", "-o", "c.png") == 0
    assert (pixels("c.png") != pixels("b.png")).any()


def test_checkpoints_of_every_network():
    picture, mask = images.read("RGB.png", 1e6).colour, torch.from_numpy(HOLES / 255).float()[None, None]
    dear = DEAR(DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8,)))
    in2 = IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8)))
    autoencoder = ImplicitAutoencoder(latent="local", channels=8, hidden=(8, 8))
    lama = LaMa(LaMaConfig(features=8, blocks=1))
    torch.save({"state_dict": {f"generator.{k}": v for k, v in lama.state_dict().items()}}, "lama.ckpt")
    for model, path in ((dear, None), (in2, None), (autoencoder, None), (lama, None), (lama, "lama.ckpt")):
        if path is None:
            path = "net.safetensors"
            model.save(path)
        model.eval()
        assert run("RGB.png", "--mask", "mask.png", "--model", path, "-o", "out.png") == 0
        expected = model.inpaint(picture, mask)
        torch.testing.assert_close(images.read("out.png", 1e6).colour, expected, rtol=0, atol=0.51 / 255)


def test_refines(capsys, monkeypatch):
    """As `FeatureRefiner`, whose memory is estimated before it starts."""
    refine = functools.partial(FeatureRefiner, min_side=13, iterations=2)
    monkeypatch.setattr(inpaint, "FeatureRefiner", refine)
    samples, holes = numpy.tile(SAMPLES[..., :3], (3, 3, 1)), numpy.tile(HOLES, (3, 3))
    Image.fromarray(samples).save("large.png")
    Image.fromarray(holes).save("holes.png")
    model = LaMa(LaMaConfig(features=8, blocks=1)).eval()
    model.save("tiny.safetensors")
    words = ["large.png", "--mask", "holes.png", "--model", "tiny.safetensors", "--refine", "-o", "out.png"]
    assert run(*words) == 0
    picture, mask = images.read("large.png", 1e6).colour, torch.from_numpy(holes / 255).float()[None, None]
    assert refine(model).scales(27, 42) == 2
    torch.testing.assert_close(
        images.read("out.png", 1e6).colour, refine(model)(picture, mask), rtol=0, atol=0.51 / 255
    )
    os.remove("out.png")
    capsys.readouterr()
    assert run("RGB.png", "--mask", "mask.png", *words[3:]) == 0
    assert "too small to refine, which needs sides of about 19: filled without" in capsys.readouterr().err
    os.remove("out.png")
    passed = []
    monkeypatch.setattr(
        inpaint.FeatureRefiner.func, "__call__", lambda self, image, *_, **__: passed.append(self) or image
    )
    assert run(*words, "--workspace", 8, "--max-memory", 0.1) == 0
    assert passed[0].workspace == 8 << 20 and 0 < passed[0].max_memory < 0.1e9 - (8 << 20)
    os.remove("out.png")
    refused(capsys, 1, "needs about .* GB of memory, more than the limit of 0.01 GB", *words, "--max-memory", "0.01")
    words[words.index("tiny.safetensors")] = "dear"
    refused(capsys, 2, "argument --refine: works at the input's size only; got --scale 2", *words, "--scale", 2)
    refused(capsys, 2, "argument --tile: does not apply with --refine; got 9", *words, "--tile", 9)


def test_in2_needs_sides_of_3(capsys):
    words = ["RGB.png", "--mask", "mask.png", "--model", "in2", "-o", "out.png"]
    assert run(*words) == 0
    for name, samples in (("RGB.png", SAMPLES[:2, :, :3]), ("mask.png", HOLES[:2])):
        Image.fromarray(samples).save(name)
    refused(capsys, 1, "input RGB.png: IN2 needs sides of at least 3 pixels; got 14x2", *words)


def test_help_lists_the_networks(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name}  ", out, re.MULTILINE) for name in (*NETWORKS, "PATH"))


def test_progress_reaches_the_end(monkeypatch):
    bars = []

    class Bar(pictures.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False})

        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(pictures, "tqdm", Bar)
    run("RGB.png", "--mask", "mask.png", "--scale", "7", "-o", "out.png")
    assert bars[0] == (1, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RGB.png", "-o", "out.png"), "the following arguments are required: --mask"),
        (("RGB.png", "--mask", "mask.png"), "the following arguments are required: -o/--output"),
        (("RGB.png", "--mask", "mask.png", "-o", "out.xcf"), "output must end in .png .* got out.xcf"),
        (("RGB.png", "--mask", "mask.png", "-o", "RGB.png"), "output must be another file than the input; got RGB.png"),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "mask.png"),
            "output must be another file than the mask; got mask.png",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--scale", "0.5"),
            "argument --scale: must be at least 1; got 0.5",
        ),
        (("RGB.png", "--mask", "mask.png", "-o", "o.png", "--scale", "2", "--size", "9x9"), "not allowed with"),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--tile", "-1"),
            "argument --tile: must be 0 or a positive integer; got -1",
        ),
        (("RGB.png", "--mask", "mask.png", "-o", "o.png", "--scale", "nan"), "must be a positive finite number"),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--model", "in2", "--tile", "0"),
            "argument --tile: applies to DEAR only, not to IN2; got 0",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--model", "dear.safetensors", "--tile", "8"),
            "argument --tile: must be 0 for a DEAR with instance norm; got 8",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--hd-strategy", "crop", "--scale", "2"),
            "argument --hd-strategy crop: works at the input's size only; got --scale 2",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o/", "--hd-strategy", "Crop", "--batch-size", "2"),
            "argument --batch-size: must be 1 with --hd-strategy crop; got 2",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--hd-strategy-crop-margin", "9"),
            "argument --hd-strategy-crop-margin: applies with --hd-strategy crop; got 9",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--hd-strategy-crop-trigger-size", "0"),
            "argument --hd-strategy-crop-trigger-size: applies with --hd-strategy crop; got 0",
        ),
        (("RGB.png", "--mask", ".", "-o", "o.png"), "mask must be a file where the output is one; got [.]"),
        (("RGB.png", "--mask", "m*k.png", "-o", "o.png"), "mask must be a file where the output is one; got m[*]k.png"),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--batch-size", "2"),
            "argument --batch-size: applies where the output is a folder; got 2",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--suffix", "_new"),
            "argument --suffix: applies where the output is a folder; got _new",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--model", "lama.safetensors", "--scale", "2"),
            "LaMa fills at the input's size only; got --scale 2",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--model", "in2", "--scale", "2"),
            "IN2 fills at the input's size only; got --scale 2",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--model", "none"),
            "argument --model: must be dear, in2 or the path of a checkpoint; got none",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "-o", "o.png", "--model", "LIIF"),
            "argument --model: must be dear, in2 .* got LIIF [(]inr-kernels upscale takes it[)]",
        ),
    ],
)
def test_wrong_command_lines(capsys, words, message):
    LaMa(LaMaConfig(features=8, blocks=1)).save("lama.safetensors")
    DEAR(DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8,))).save("dear.safetensors")
    refused(capsys, 2, message, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RGB.png", "--mask", "small.png"), "mask small.png: must have the input's size 14x9; got 13x9"),
        (("RGB.png", "--mask", "none.png"), "none.png: No such file or directory"),
        (("none.png", "--mask", "mask.png"), "none.png: No such file or directory"),
        (("text.png", "--mask", "mask.png"), "text.png: not a picture in a format that is read: PNG, JPEG"),
        (("RGB.png", "--mask", "text.png"), "text.png: not a picture in a format that is read: PNG, JPEG"),
        (("cut.png", "--mask", "mask.png"), "cut.png: .*(truncated|broken)"),
        (("RGB.png", "--mask", "cut.png"), "cut.png: .*(truncated|broken)"),
        (("RGB.png", "--mask", "mask.png", "--max-megapixels", "1e-5"), "14 x 9 .* limit of 1e-05 .*--max-megapixels"),
        (("huge.png", "--mask", "mask.png"), "9000 x 9000 pixels are more than the limit of 25 megapixels"),
        (("RGB.png", "--mask", "mask.png", "--model", "none.ckpt"), "none.ckpt: No such file or directory"),
        (
            ("RGB.png", "--mask", "mask.png", "--model", "text.png"),
            "text.png is not a DEAR, IN2, ImplicitAutoencoder, LaMa, LTE or LIIF checkpoint",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "--model", "cut.safetensors"),
            "cut.safetensors is not a DEAR, IN2, ImplicitAutoencoder, LaMa",
        ),
        (
            ("RGB.png", "--mask", "mask.png", "--model", "liif.safetensors"),
            "liif.safetensors is a LIIF checkpoint, which does not inpaint; use inr-kernels upscale",
        ),
        (("RGB.png", "--mask", "mask.png", "--scale", "1e6"), "needs about .* GB of memory, .* are free"),
        (("RGBA.png", "--mask", "mask.png", "-o", "out.jpg"), "JPEG holds no transparency"),
        (("RGB.png", "--mask", "mask.png", "-o", "no/out.png"), "no/out.png: the folder of the output does not exist"),
    ],
)
def test_errors(capsys, folder, words, message):
    (folder / "text.png").write_text("no picture")
    Image.fromarray(HOLES[:, 1:]).save("small.png")
    Image.new("1", (9000, 9000)).save("huge.png")
    Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (90, 80, 3), numpy.uint8)).save("cut.png")
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    LIIF(LIIFConfig(blocks=1, features=4, hidden=(4,))).save("liif.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "liif.safetensors").read_bytes()[:900])
    refused(capsys, 1, message, "-o", "out.png", *words)


def test_a_failed_write_leaves_nothing(capsys, folder, monkeypatch):
    def replace(source, target):
        raise OSError(28, "No space left on device", source, target)

    (folder / "out.png").write_text("older")
    monkeypatch.setattr(os, "replace", replace)
    refused(capsys, 1, "out.png: No space left", "RGB.png", "--mask", "mask.png", "-o", "out.png")
    assert (folder / "out.png").read_text() == "older"
