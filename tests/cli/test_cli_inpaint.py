"""The command inr-kernels inpaint: what it fills, what it keeps, what it refuses."""

import os
import re

import numpy
import pytest
import torch
from PIL import Image

from inr_kernels import cli
from inr_kernels.cli import inpaint
from inr_kernels.models import DEAR, IN2, LIIF, DEARConfig, IN2Config, LIIFConfig
from inr_kernels.models.data import images

SAMPLES = numpy.random.default_rng(0).integers(0, 255, (9, 14, 4), numpy.uint8)
PICTURES = {"L": SAMPLES[..., 0], "LA": SAMPLES[..., :2], "RGB": SAMPLES[..., :3], "RGBA": SAMPLES}
HOLES = numpy.zeros((9, 14), numpy.uint8)
HOLES[2:6, 3:11] = 255


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with a picture and its mask; the number of threads outlives none."""
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


@pytest.mark.parametrize("model", inpaint.NETWORKS)
@pytest.mark.parametrize("mode", PICTURES)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_known_pixels_stay(model, mode, suffix):
    assert run(f"{mode}.png", "--mask", "mask.png", "--model", model, "-o", f"out.{suffix}") == 0
    out, known = pixels(f"out.{suffix}"), HOLES == 0
    assert out.shape == PICTURES[mode].shape and (out[known] == PICTURES[mode][known]).all()
    colours = slice(0, 3) if mode.startswith("RGB") else slice(0, 1)
    filled, had = (p.reshape(9, 14, -1)[~known][:, colours] for p in (out, PICTURES[mode]))
    assert (filled != had).mean() > 0.9
    assert filled.astype(float).std() < had.astype(float).std()  # noise cannot be guessed


@pytest.mark.parametrize(("name", "network"), inpaint.NETWORKS.items())
def test_the_picture_is_the_models(name, network):
    model = network.pretrained()
    picture = images.read("RGB.png", 1e6).colour
    mask = torch.from_numpy(HOLES / 255).float()[None, None]
    for words, options in (((), {}), (("--scale", "2.5"), {"scale": 2.5}), (("--size", "9x31"), {"size": (9, 31)})):
        assert run("RGB.png", "--mask", "mask.png", "--model", name, *words, "-o", "out.png") == 0
        expected = model.inpaint(picture, mask, **options)
        torch.testing.assert_close(images.read("out.png", 1e6).colour, expected, rtol=0, atol=0.51 / 255)


def test_transparency_grows_with_the_picture():
    assert run("RGBA.png", "--mask", "mask.png", "--scale", "2", "-o", "out.png") == 0
    assert pixels("out.png").shape == (18, 28, 4)


def test_16_bits_stay():
    deep = images.Picture(torch.rand(1, 3, 9, 14), depth=16)
    images.write("deep.png", deep)
    assert run("deep.png", "--mask", "mask.png", "-o", "out.png") == 0
    had, out = images.read("deep.png", 1e6), images.read("out.png", 1e6)
    known = torch.from_numpy(HOLES == 0).expand(3, 9, 14)
    assert out.depth == 16 and torch.equal(out.colour[0][known], had.colour[0][known])


@pytest.mark.parametrize("values", [(127, 128), (0, 255), (100, 200)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_masks_are_cut_at_128(values, mode):
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
    DEAR(DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8,))).save("tiny.safetensors")
    words = ["RGB.png", "--mask", "mask.png", "--scale", "2", "--model", "tiny.safetensors", "--threads", "3"]
    assert run(*words, "--workspace", "1", "--backend", "reference", "-o", "a.png") == 0
    assert torch.get_num_threads() == 3
    assert run(*words, "--backend", "cpu", "-o", "b.png") == 0
    assert abs(pixels("a.png").astype(int) - pixels("b.png")).max() <= 1
    for tile in (0, 32, 4):  # the picture fits into one of 32
        assert run(*words, "--tile", tile, "-o", f"tile{tile}.png") == 0
    assert (pixels("tile0.png") == pixels("tile32.png")).all() and (pixels("tile4.png") != pixels("tile32.png")).any()
    assert run(*words[:-4], "--model", "dear", "-o", "c.png") == 0
    assert (pixels("c.png") != pixels("b.png")).any()


def test_a_checkpoint_is_of_the_network_that_wrote_it():
    picture, mask = images.read("RGB.png", 1e6).colour, torch.from_numpy(HOLES / 255).float()[None, None]
    dear = DEAR(DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8,)))
    for model in (dear, IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8)))):
        model.eval().save("net.safetensors")
        assert run("RGB.png", "--mask", "mask.png", "--model", "net.safetensors", "-o", "out.png") == 0
        expected = model.inpaint(picture, mask)
        torch.testing.assert_close(images.read("out.png", 1e6).colour, expected, rtol=0, atol=0.51 / 255)


def test_a_picture_for_in2_may_have_any_size_from_9_on(capsys):
    words = ["RGB.png", "--mask", "mask.png", "--model", "in2", "-o", "out.png"]
    assert run(*words) == 0
    for name, samples in (("RGB.png", SAMPLES[:8, :, :3]), ("mask.png", HOLES[:8])):
        Image.fromarray(samples).save(name)
    refused(capsys, 1, "sides of at least 9", *words)


def test_the_help_says_which_networks_there_are(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name}  ", out, re.MULTILINE) for name in (*inpaint.NETWORKS, "PATH"))


def test_progress_counts_rows(monkeypatch):
    bars = []

    class Bar(inpaint.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False})

        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(inpaint, "tqdm", Bar)
    run("RGB.png", "--mask", "mask.png", "--scale", "7", "-o", "out.png")
    assert bars[0] == (63, 63)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RGB.png", "-o", "out.png"), "the following arguments are required: --mask"),
        (("RGB.png", "--mask", "mask.png"), "the following arguments are required: -o/--output"),
        (("RGB.png", "--mask", "mask.png", "-o", "out.xcf"), "output must end in .png .* got out.xcf"),
        (("RGB.png", "--mask", "mask.png", "-o", "RGB.png"), "output must be another file than the input; got RGB.png"),
        (("RGB.png", "--mask", "mask.png", "-o", "mask.png"), "output must be another file than the input"),
        (("RGB.png", "--mask", "mask.png", "-o", "o.png", "--scale", "0.5"), "output must not be smaller .* 9x14"),
        (("RGB.png", "--mask", "mask.png", "-o", "o.png", "--scale", "2", "--size", "9x9"), "not allowed with"),
        (("RGB.png", "--mask", "mask.png", "-o", "o.png", "--tile", "-1"), "must be a finite positive integer; got -1"),
        (("RGB.png", "--mask", "mask.png", "-o", "o.png", "--scale", "nan"), "must be a finite positive number"),
        (("RGB.png", "--mask", "mask.png", "-o", "o.png", "--model", "in2", "--tile", "0"), "IN2 sees the whole .* 0"),
    ],
)
def test_wrong_command_lines(capsys, words, message):
    refused(capsys, 2, message, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("RGB.png", "--mask", "small.png"), "small.png: the mask must have the input's size 9x14; got 9x13"),
        (("RGB.png", "--mask", "none.png"), "none.png: No such file or directory"),
        (("none.png", "--mask", "mask.png"), "none.png: No such file or directory"),
        (("text.png", "--mask", "mask.png"), "text.png: not a picture that Pillow knows"),
        (("RGB.png", "--mask", "text.png"), "text.png: not a picture that Pillow knows"),
        (("cut.png", "--mask", "mask.png"), "cut.png: .*(truncated|broken)"),
        (("RGB.png", "--mask", "cut.png"), "cut.png: .*(truncated|broken)"),
        (("RGB.png", "--mask", "mask.png", "--max-megapixels", "1e-5"), "14 x 9 .* limit of 1e-05 .*--max-megapixels"),
        (("huge.png", "--mask", "mask.png"), "9000 x 9000 pixels are more than the limit of 25 megapixels"),
        (("RGB.png", "--mask", "mask.png", "--model", "none"), "none: No such file or directory"),
        (("RGB.png", "--mask", "mask.png", "--model", "text.png"), "text.png is not a DEAR or IN2 checkpoint"),
        (("RGB.png", "--mask", "mask.png", "--model", "cut.safetensors"), "cut.safetensors is not a DEAR or IN2 check"),
        (
            ("RGB.png", "--mask", "mask.png", "--model", "liif.safetensors"),
            "liif.* checkpoint: its config is neither's",
        ),
        (("RGB.png", "--mask", "mask.png", "--scale", "1e6"), "needs about .* GB of memory, .* are free"),
        (("RGBA.png", "--mask", "mask.png", "-o", "out.jpg"), "JPEG holds no transparency"),
        (("RGB.png", "--mask", "mask.png", "-o", "no/out.png"), "no: the folder of the output does not exist"),
    ],
)
def test_what_it_refuses(capsys, folder, words, message):
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
    def save(self, path, *args, **kwargs):
        path.write_text("half a picture")
        raise OSError(28, "No space left on device")

    (folder / "out.png").write_text("older")
    monkeypatch.setattr(Image.Image, "save", save)
    refused(capsys, 1, "No space left", "RGB.png", "--mask", "mask.png", "-o", "out.png")
    assert (folder / "out.png").read_text() == "older"
