"""`inr-kernels train`: runs that are killed and resumed, several processes, files that cannot be used, options."""

import dataclasses
import struct
import subprocess
import sys
import time
import zlib

import numpy
import pytest
import torch
from PIL import Image
from training_cases import ADVERSARIAL, CONFIGS, TINY, curve, photographs_in, same, vgg19_state, words

from inr_kernels import cli
from inr_kernels.fourier_unit.module import fused
from inr_kernels.models import from_checkpoint
from inr_kernels.models.training import config, loop, samples


@pytest.fixture(scope="module", autouse=True)
def small_maps():
    """The rule on small maps is that of the processes that these tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "MIN_POSITIONS", 1024)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs_in(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("name", TINY)
def test_every_network_trains(name, photos, tmp_path, capsys):
    before = {path: path.read_bytes() for path in photos.iterdir()}
    cli.main(words(name, photos, tmp_path / "run", "pictures_every=3 ema=0.9"))
    model = from_checkpoint(tmp_path / "run" / "model.safetensors")
    assert isinstance(model, config.recipe(name).NETWORK) and model.notes["step"] == 3
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'model.safetensors'}\n"
    names = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {n for n in names if not n.startswith("events")} == {
        *("config.yaml", "model.safetensors", "00000003.pt", "00000003.safetensors")
    }
    assert [*tmp_path.iterdir()] == [tmp_path / "run"] and before == {p: p.read_bytes() for p in photos.iterdir()}
    assert not same(model, from_checkpoint(tmp_path / "run" / "checkpoints" / "00000003.safetensors"))  # the average


# A run writes config.yaml, then at every save the network, the result and the rest.
KILL = """
import os, signal, sys
from inr_kernels import cli
from inr_kernels._core import files
before, replace = [int(sys.argv[1])], os.replace
def killed(source, target):
    before[0] -= 1
    if not before[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
files.os.replace = killed
cli.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    cli.main(words("in2", photos, out, ADVERSARIAL, "ema=0.5 clip=1 accumulate=2"))
    return out


@pytest.mark.parametrize("write", [2, 6, 7])  # before the first save; before a result is written; between its two files
def test_a_killed_run_continues_the_same_curve(write, photos, whole, tmp_path):
    arguments = words("in2", photos, tmp_path / "run", ADVERSARIAL, "ema=0.5 clip=1 accumulate=2")
    done = subprocess.run([sys.executable, "-c", KILL, str(write), *arguments], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    time.sleep(1)  # TensorBoard orders a run's files by their names, which have whole seconds and then the process
    with pytest.raises(SystemExit, match="1"):
        cli.main(arguments)  # it does not begin again over the run
    cli.main([*arguments, "--resume", "workers=1"])
    assert curve(tmp_path / "run") == curve(whole) and len(curve(whole)["loss/r1"]) == 3
    for name in ("model.safetensors", "checkpoints/00000003.safetensors"):
        assert same(from_checkpoint(tmp_path / "run" / name), from_checkpoint(whole / name))


def huge_png():
    """A PNG whose header claims 100000 x 100000 pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 100000, 100000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_unusable_files_are_named_once(photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "good.png").write_bytes((photos / "0.png").read_bytes())
    (folder / "bad.jpg").write_bytes((photos / "1.jpg").read_bytes()[:300])
    (folder / "huge.png").write_bytes(huge_png())
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    cli.main(words("liif", folder, tmp_path / "run", "steps=5"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 3 and all(line.startswith("inr-kernels: skipped: ") for line in lines)
    assert all(sum(name in line for line in lines) == 1 for name in ("bad.jpg", "huge.png", "pixel.png"))
    (folder / "good.png").unlink()
    with pytest.raises(SystemExit, match="1"):
        cli.main(words("liif", folder, tmp_path / "none"))
    assert "none of 3 pictures can be used" in capsys.readouterr().err


def load(name, *changes):
    return config.load(CONFIGS.get(name, f"{name}_small"), [*TINY[name].split(), *changes])


def batches(options, pictures=None, **place):
    return samples.Batches(
        config.recipe(options.network), options, pictures or samples.training_pictures(options), **place
    )


@pytest.mark.parametrize("name", TINY)
def test_batches_depend_on_seed_and_step_alone(name, photos):
    options = load(name, f"data={photos}", "batch=4", "min_side=8")
    (first, problems), (again, _), (other, _) = (batches(options)[step] for step in (5, 5, 6))
    assert not problems and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
    halves = [batches(options, rank=rank, world=2)[5][0] for rank in (0, 1)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(first, zip(*halves, strict=True), strict=True))
    assert first[0].min() >= (-1 if name in ("liif", "lte") else 0) and first[0].max() <= 1


def test_masks_of_folders(photos, tmp_path):
    """Paired by name, they move with the picture."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "copies").mkdir()
    for path in photos.iterdir():  # a mask that shows where the picture is bright
        rng = numpy.random.default_rng(1)
        values = numpy.kron(rng.integers(0, 2, (6, 5), dtype=numpy.uint8) * 255, numpy.ones((16, 16), numpy.uint8))
        Image.fromarray(values).save(tmp_path / "masks" / f"{path.stem}.png")
        Image.fromarray(values).convert("RGB").save(tmp_path / "copies" / f"{path.stem}.png")
    changes = [
        f"data={tmp_path / 'copies'}",
        f"masks={tmp_path / 'masks'}",
        "area=1024",
        "permute=false",
        "invert=false",
    ]
    options = load("in2", *changes, "pairing=name", "zoom=1")
    image, mask = batches(options)[0][0]
    assert 0 < mask.mean() < 1 and ((image.mean(1, keepdim=True) > 0.5) == (mask == 1)).float().mean() > 0.95
    _, mask = batches(load("in2", *changes))[0][0]
    assert 0 < mask.mean() < 1
    (tmp_path / "masks" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"masks: none has the name of 0\.png"):
        batches(options)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("strokes:20-30", 0.15, 0.45), ("noise:50", 0.4, 0.6), ("thin", 0.01, 0.6)]
)
def test_masks_of_kinds(kind, low, high):
    options = load("in2", f"masks={kind}", "area=16384", "batch=2")
    pictures = samples.Pictures([Image.linear_gradient("L").convert("RGB")])
    (_, mask), _ = batches(options, pictures)[0]
    assert mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0, 1} and low < mask.mean() < high


def test_the_autoencoder_is_validated():
    options = load("autoencoder")
    module = config.recipe("autoencoder")
    model = module.NETWORK(loop.state.network_config(module.NETWORK, options.model)).eval()
    found = module.validate(model, samples.held_out(options), options)
    assert found.keys() == {"psnr", "psnr_mean_fill"} and found["psnr_mean_fill"] > 15


def test_the_shipped_autoencoder_fills_single_pixels():
    """Half of those of the held-out photograph, in crops; and its notes hold the recipe."""
    options = config.load("autoencoder")
    model = config.recipe("autoencoder").NETWORK.pretrained()
    found = config.recipe("autoencoder").validate(model, samples.held_out(options), options)
    assert found["psnr"] > found["psnr_mean_fill"] + 8
    assert model.config.latent == "local" and model.notes["recipe"]["masks"] == "noise"


def test_the_papers_values():
    """In steps of an epoch of 100."""
    in2, dear, liif = (config.load(f"{name}_paper", ["data=x"]) for name in ("in2", "dear", "liif"))
    at = {}
    for options in (in2, dear, liif):
        steps, warmup, halve = (
            config.duration(n, getattr(options, n), 100) for n in ("steps", "warmup", "halve_every")
        )
        at[options.network] = [
            loop.learning_rate(s, steps, warmup, options, halve) for s in (0, 1499, 9999, 10000, 19999)
        ]
    assert at["in2"][:2] == [pytest.approx(4e-5, rel=0.01), pytest.approx(4e-4)] and at["in2"][2] < 1e-10
    assert at["dear"] == [1e-4, 1e-4, 1e-4, 5e-5, 5e-5]
    assert at["liif"] == [1e-4, 1e-4, 1e-4, 1e-4, 1e-4]
    assert (in2.batch, dear.batch, liif.batch) == (3, 16, 16) and in2.masks == "strokes:20-30"
    assert dataclasses.asdict(in2.loss) == {
        **{"l1": 0, "missing": 0, "l2": 0, "adversarial": 1, "feature_matching": 0.1, "r1": 10, "perceptual": 10},
        **{"vgg": "", "hint": 0, "teacher": ""},
    }
    assert in2.model == dear.model == liif.model == {}  # the networks' defaults are the papers' structures


def test_margins_keep_most_of_a_picture(photos):
    options = load("in2", "data=", "crop=margins", "area=1024", "aspect=[0.5,2]", "permute=false", "invert=false")
    image = Image.linear_gradient("L").convert("RGB")  # 0 at the top, 255 at the bottom
    for step in range(8):
        pictures = samples.Pictures([image])
        values = batches(options, pictures)[step][0][0]
        grey = values.mean(1)
        height, width = grey.shape[1:]
        assert abs(height * width / 1024 - 1) < 0.05
        if height >= width:  # only the sides are cut off: the rows from black to white stay
            assert (grey.flatten(1).amax(1) > 0.98).all() and (grey.flatten(1).amin(1) < 0.02).all()


def test_a_term_of_weight_0_is_not_computed(tmp_path):
    torch.save(vgg19_state(), tmp_path / "vgg19.pth")
    model, tensors = None, None
    names = {}
    for changes in (
        "",
        ADVERSARIAL,
        f"loss.l1=0 loss.l2=0 loss.hint=0 loss.perceptual=10 loss.vgg={tmp_path / 'vgg19.pth'}",
    ):
        options = load("in2", "data=", *changes.split())
        module = config.recipe("in2")
        if model is None:
            torch.manual_seed(0)
            model = module.NETWORK(loop.state.network_config(module.NETWORK, options.model))
            tensors = batches(options)[0][0]
        terms = module.Objective(options)(model, tensors, loop.nullcontext)
        names[changes[:9]] = set(terms)
        sum(terms.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert list(names.values()) == [
        {"l1", "l2", "hint"},
        {"l1", "l2", "hint", "adversarial", "feature_matching", "discriminator", "r1"},
        {"perceptual"},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("foo=1", "Key 'foo' not in"),
        ("lr=fast", "could not be converted to Float"),
        ("batch=3 accumulate=2", "batch must be a multiple of accumulate * devices * nodes; got 3"),
        ("steps=many", "steps must be a number of steps or a text"),
        ('out=""', "out must name the folder of the run"),
        ("network=x", "network must be one of autoencoder, dear, in2, lama, liif, lte; got 'x'"),
        ("loss.perceptual=1", "loss.vgg must name the file of VGG-19's weights"),
        ("loss.perceptual=1 loss.vgg=none.pth", "none.pth: No such file"),
        ("model.layers=2", "model must have fields of IN2's config"),
        ("data=nowhere", "nowhere: No such file"),
        ("precision=16", "precision must be one of 32-true, bf16-mixed"),
        ("share=[0.5,2]", "share must be two numbers"),
    ],
)
def test_mistakes_are_found_before_the_work(changes, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["train", "in2_small", "out=run", "steps=1", *changes.split()])
    assert message in capsys.readouterr().err and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("change", "message"),
    [("lr=0.5", "lr must be 0.001, as in the run in"), ("seed=1", "seed must be 0"), ("area=900", "area must be 1600")],
)
def test_resume_refuses_options_that_change_the_numbers(change, message, photos, tmp_path, capsys):
    cli.main(words("lama", photos, tmp_path / "run", "steps=1"))
    with pytest.raises(SystemExit, match="1"):
        cli.main([*words("lama", photos, tmp_path / "run", "steps=1"), change, "--resume"])
    assert message in capsys.readouterr().err


def test_parameters_that_are_not_finite_are_not_saved(photos, tmp_path, monkeypatch, capsys):
    step = torch.optim.Adam.step

    def broken(optimizer):
        step(optimizer)
        if optimizer.param_groups[0]["lr"] < 8e-4:  # the second step
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.Adam, "step", broken)
    with pytest.raises(SystemExit, match="1"):
        cli.main(words("liif", photos, tmp_path / "run", "warmup=0 log_every=100 schedule=halve halve_every=1"))
    assert "step 2: the parameters of the network are not finite" in capsys.readouterr().err
    assert from_checkpoint(tmp_path / "run" / "model.safetensors").notes["step"] == 1


def test_dear_without_importance_maps_trains(photos, tmp_path):
    cli.main(words("dear", photos, tmp_path / "run", "steps=1 model.pim=false"))
    assert not from_checkpoint(tmp_path / "run" / "model.safetensors").config.pim


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(loop, "find_spec", lambda name: None if name == "cv2" else name)
    with pytest.raises(ImportError, match=r"needs opencv-python-headless: pip install 'inr-kernels\[train\]'"):
        loop.check(config.load("in2_small", ["out=run"]))
    loop.check(config.load("in2_small", ["out=run", "validate_every=0"]))


@pytest.mark.parametrize("path", sorted(config.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_option_has_a_help_text(path, tmp_path, capsys):
    cli.main(["train", path.stem, "--print-config"])
    text = capsys.readouterr().out
    (tmp_path / "own.yaml").write_text(text)
    assert config.load(str(tmp_path / "own.yaml")) == config.load(path.stem)
    options = [line for line in text.splitlines() if not line.strip().startswith("#")]
    helps = [line for line in text.splitlines() if line.strip().startswith("# ") and len(line.strip()) > 6]
    assert len(options) == len(helps) > 30
