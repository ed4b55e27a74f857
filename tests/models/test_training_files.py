"""Masks of training runs from folders, options that are ranges, and how a run is set up."""

from datetime import timedelta

import lightning_fabric
import numpy
import pytest
import torch
from PIL import Image
from training_cases import TINY, photographs_in, words

from inr_kernels import cli
from inr_kernels.models import IN2, IN2Config
from inr_kernels.models.data import images, masks
from inr_kernels.models.data.sources import Masks, Part, Pictures, find
from inr_kernels.models.training import config, loop, samples

SIDE = 16


@pytest.fixture
def paired(tmp_path):
    """Pictures of one colour in two folders, and masks of the same names: all missing in a, nothing in b."""
    for folder, grey in (("a", 200), ("b", 90)):
        for place in ("photos", "masks"):
            (tmp_path / place / folder).mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE), (grey,) * 3).save(tmp_path / "photos" / folder / "1.jpg")
        Image.new("L", (SIDE, SIDE), 255 * (folder == "a")).save(tmp_path / "masks" / folder / "1.png")
    return tmp_path


def options(folder, *changes):
    places = [f"data={folder / 'photos'}", f"masks={folder / 'masks'}", "pairing=name", "permute=false", "invert=false"]
    return config.load("in2_small", [*TINY["in2"].split(), *places, "min_side=8", "batch=4", *changes])


def batch(given, step=0):
    """Image, mask and the problems of a step."""
    (image, mask), problems = samples.Batches(config.recipe("in2"), given, samples.training_pictures(given))[step]
    return image, mask, problems


def test_masks_are_paired_by_their_paths(paired):
    image, mask, problems = batch(options(paired))
    assert not problems and len(image.mean((1, 2, 3)).unique()) == 2
    assert torch.equal(mask.mean((1, 2, 3)) == 1, image.mean((1, 2, 3)) > 0.5)
    (paired / "masks" / "a" / "1.png").rename(paired / "masks" / "1.png")
    with pytest.raises(ValueError, match=r"masks: none has the name of 1\.jpg"):
        batch(options(paired))


def test_pictures_of_lists_have_names_too(paired):
    (paired / "list.txt").write_text(f"photos/a/1.jpg\n\n{paired / 'photos' / 'b' / '1.jpg'}\n")
    assert [file.name for file in find(paired / "list.txt")] == ["photos/a/1", "1"]
    assert [file.name for file in find([paired / "photos" / "a", paired / "photos" / "b" / "1.jpg"])] == ["1", "1"]
    Image.new("L", (2, 2)).save(paired / "masks" / "a" / "1.bmp")
    with pytest.raises(ValueError, match="masks: several have the name a/1; pairing=name needs one of each name"):
        batch(options(paired))


def test_a_damaged_mask_is_named_once_and_its_picture_skipped(paired, tmp_path, capsys):
    (paired / "masks" / "a" / "1.png").write_bytes(b"\x89PNG")
    image, _, problems = batch(options(paired))
    assert len(problems) == 2 and problems[0].startswith(f"skipped: {paired / 'masks' / 'a' / '1.png'}")
    assert torch.allclose(image, torch.tensor(90 / 255), atol=0.01)
    changes = f"masks={paired / 'masks'} pairing=name steps=4"
    cli.main(words("in2", paired / "photos", tmp_path / "run", changes))
    err = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(err) == 1 and err[0].startswith(f"inr-kernels: skipped: {paired / 'masks' / 'a' / '1.png'}")


@pytest.mark.parametrize("pairing", ["random", "name"])
def test_masks_have_the_rule_of_inpaint(pairing, tmp_path):
    """Brightness times opacity, at least half: not luminance, in which this blue is dark and this green bright."""
    pixels = numpy.zeros((2, 6, 4), numpy.uint8)
    pixels[:, 0] = 255, 255, 255, 255  # missing
    pixels[:, 1] = 255, 255, 255, 60  # white, but transparent
    pixels[:, 2] = 80, 80, 255, 255  # 138 of 255, whose luminance is 100
    pixels[:, 3] = 0, 255, 60, 255  # 105, whose luminance is 157
    pixels[:, 4] = 128, 128, 128, 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    Image.new("RGB", (6, 2)).save(tmp_path / "mask.jpg")
    (picture,) = find(tmp_path / "mask.jpg")
    drawing = Masks([str(tmp_path / "mask.png")], pairing, (0, 0), Pictures([picture]))
    mask = drawing.draw(picture, Image.new("RGB", (6, 2)), Part((0, 0, 6, 2), (2, 6)), numpy.random.default_rng(0), [])
    expected = masks.from_picture(images.read(tmp_path / "mask.png", 1e6))[0]
    assert expected[0, 0].tolist() == [1, 0, 1, 0, 1, 0]
    assert torch.equal(mask, expected) or (pairing == "random" and torch.equal(mask, expected.flip(2)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("in2", "aspect=[1]", "aspect must be two numbers above 0, the lower one first; got [1.0]"),
        ("in2", "aspect=[0,1]", "aspect must be two numbers above 0"),
        ("in2", "area=0", "area must be positive; got 0"),
        ("lama", "share=[0.1,0.2,0.3]", "share must be two numbers from 0 to below 1"),
        ("lama", "pairing=both", "pairing must be random or name; got 'both'"),
        ("dear", "scales=[1]", "scales must be two numbers of at least 1, the lower one first; got [1.0]"),
        ("dear", "queries=-1", "queries must not be negative; got -1"),
        ("liif", "scales=[4,1]", "scales must be two numbers of at least 1"),
        ("lte", "side=0", "side must be positive; got 0"),
        ("liif", "zoom=0.5", "zoom must be at least 1; got 0.5"),
        ("autoencoder", "betas=[0.9]", "betas must be two numbers from 0 to below 1; got [0.9]"),
        ("autoencoder", "timeout=0", "timeout must be positive; got 0"),
    ],
)
def test_ranges_are_checked_before_the_work(name, change, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        cli.main(words(name, photographs_in(tmp_path), tmp_path / "run", change))
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_average_forgets_the_random_start():
    """After 60 steps of decay 0.999, when the usual average still has 94 % of it."""
    model = torch.nn.Linear(1, 1)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=loop.moving_average(0.999), use_buffers=True)
    for step in range(60):
        torch.nn.init.constant_(model.weight, 100.0 if step == 0 else 1.0)
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1, abs=1e-3)
    exact = loop.moving_average(0.5)
    values = [torch.zeros(2)]
    exact(values, [torch.ones(2)], torch.tensor(1000))
    assert values[0].tolist() == [0.5, 0.5]


def test_batch_norms_of_several_processes(capsys):
    """On GPUs they share their statistics, with the same state dict; on CPUs they cannot, which is said."""
    structure = IN2Config(channels=(16, 16), groups=1, blocks=1, heads=2, hidden=(16,))
    model, cpu, gpu = IN2(structure).eval(), torch.device("cpu"), torch.device("cuda", 0)
    given = torch.rand(1, 3, 24, 24), torch.zeros(1, 1, 24, 24)
    expected, state = model.predict(*given), dict(model.state_dict())
    assert loop.synchronized(model, 1, gpu) is model and loop.synchronized(model, 2, cpu) is model
    assert capsys.readouterr().err == "inr-kernels: on CPUs each process has its own statistics in batch norms\n"
    assert loop.synchronized(torch.nn.Linear(1, 1), 2, cpu) and loop.synchronized(model, 2, cpu, say=False)
    found = loop.synchronized(model, 2, gpu)
    assert not capsys.readouterr().err and found.state_dict().keys() == state.keys()
    kinds = {type(module) for module in found.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds == {torch.nn.SyncBatchNorm}
    torch.testing.assert_close(found.eval().predict(*given), expected)


@pytest.mark.parametrize(("devices", "minutes"), [(1, None), (2, 30)])
def test_processes_wait_as_long_as_timeout_says(devices, minutes, monkeypatch, tmp_path):
    """While the first one validates."""
    found = []

    def fabric(**arguments):
        found.append(arguments["strategy"])
        raise RuntimeError("no run")

    monkeypatch.setattr(lightning_fabric, "Fabric", fabric)
    with pytest.raises(RuntimeError, match="no run"):
        loop.train(config.load("liif_small", [f"out={tmp_path}", f"devices={devices}", "timeout=30"]))
    (strategy,) = found
    assert strategy == "auto" if minutes is None else strategy._timeout == timedelta(minutes=minutes)
