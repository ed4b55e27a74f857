"""LaMa's checkpoints in the forms in which others publish them, and files that are refused."""

import argparse
import collections
import io
import os
import re
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from published_cases import Callback, holds, prefixed
from safetensors.torch import save_file
from torch import nn

from inr_kernels import cli, models
from inr_kernels.models import LaMa, LaMaConfig

LAMA = LaMa(LaMaConfig(features=8, blocks=2))
STATE = LAMA.state_dict()

LIGHTNING = {
    "state_dict": prefixed("generator.", STATE) | {"discriminator.model0.0.weight": torch.ones(2)},
    "epoch": 39,
    "hyper_parameters": argparse.Namespace(lr=numpy.float64(1e-3), sizes=numpy.arange(3)),
    "callbacks": {Callback: Callback()},
    "counts": collections.defaultdict(list, {"steps": collections.deque([1, 2])}),
}


class Skeleton(nn.Module):
    """Submodules at dotted names; its forward uses none of them, because tracing keeps their tensors anyway."""

    def __init__(self, name, module):
        super().__init__()
        first, _, rest = name.partition(".")
        self.add_module(first, Skeleton(rest, module) if rest else module)

    def forward(self, image, mask):
        return image * mask


def script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript
        traced = torch.jit.trace(module.eval(), (torch.rand(1, 3, 9, 9), torch.rand(1, 1, 9, 9)), check_trace=False)
        traced.save(path)
    return traced


def rewritten(path, changes, compression=zipfile.ZIP_STORED):
    """Writes a zip file again; changes: parts of members' names -> their new content."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, next((new for part, new in changes.items() if part in name), content))


def packed(path, activation="sigmoid", name="models/best.ckpt"):
    """LaMa's own zip file."""
    checkpoint = io.BytesIO()
    torch.save(LIGHTNING, checkpoint)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big-lama/config.yaml", f"generator:\n  kind: ffc_resnet\n  add_out_act: {activation}\n")
        archive.writestr(f"big-lama/{name}", checkpoint.getvalue())


LAMA_FILES = {
    "Lightning": lambda path: torch.save(LIGHTNING, path),
    "torch before 1.6": lambda path: torch.save(LIGHTNING, path, _use_new_zipfile_serialization=False),
    "no generator.": lambda path: torch.save({"state_dict": STATE}, path),
    "doubled model.": lambda path: torch.save(prefixed("model.", STATE), path),
    "module.": lambda path: torch.save(prefixed("module.", STATE), path),
    "module.generator.": lambda path: torch.save({"state_dict": prefixed("module.generator.", STATE)}, path),
    "generator.module.": lambda path: torch.save({"state_dict": prefixed("generator.module.", STATE)}, path),
    "two generators": lambda path: torch.save(prefixed("ema.", STATE) | prefixed("generator.", STATE), path),
    "safetensors": lambda path: save_file(prefixed("generator.", STATE), path),
    "TorchScript": lambda path: script(Skeleton("model.generator", LAMA), path),
    "TorchScript without code": lambda path: (
        script(Skeleton("model", LAMA), path),
        rewritten(path, {"/code/": b"no code", "constants.pkl": b"no pickle"}),
    ),
    "zip": packed,
    "compressed again": lambda path: (
        torch.save(LIGHTNING, path),
        rewritten(path, {}, zipfile.ZIP_DEFLATED),
    ),
}


@pytest.mark.parametrize("form", LAMA_FILES)
def test_lamas_files(form, tmp_path):
    path = tmp_path / "lama.pth.tar"  # the name is ignored
    LAMA_FILES[form](path)
    for model in (LaMa.from_checkpoint(path), models.from_checkpoint(str(path))):
        assert holds(model, STATE) and model.config == LAMA.config and not model.training


def test_the_name_of_a_file_is_ignored(tmp_path):
    torch.save(LIGHTNING, tmp_path / "lama.safetensors")
    save_file(STATE, tmp_path / "lama.ckpt")
    assert holds(LaMa.from_checkpoint(tmp_path / "lama.safetensors"), STATE)
    assert holds(LaMa.from_checkpoint(tmp_path / "lama.ckpt"), STATE)


def test_threads_read_one_file_at_a_time(tmp_path, monkeypatch):
    """torch's list of allowed classes belongs to the process."""
    torch.save(LIGHTNING, tmp_path / "lama.ckpt")
    allowed, load = [], torch.load

    def slow(*args, **kwargs):
        allowed.append(len(torch.serialization.get_safe_globals()))
        time.sleep(0.1)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", slow)
    with ThreadPoolExecutor(3) as pool:
        loaded = pool.map(LaMa.from_checkpoint, [tmp_path / "lama.ckpt"] * 3)
        assert all(holds(model, STATE) for model in loaded)
    assert len(set(allowed)) == 1


@pytest.mark.parametrize(("written", "activation"), [("true", "tanh"), ("false", "none"), ("sigmoid", "sigmoid")])
def test_the_activation_in_lamas_zip(written, activation, tmp_path):
    packed(tmp_path / "lama.zip", written)
    assert LaMa.from_checkpoint(tmp_path / "lama.zip", activation="none").config.activation == activation


def test_the_command_line_takes_lamas_files(tmp_path):
    from PIL import Image

    script(Skeleton("model.generator", LAMA), tmp_path / "big-lama.pt")
    Image.new("RGB", (20, 16), "red").save(tmp_path / "photo.png")
    mask = Image.new("L", (20, 16), 0)
    mask.paste(255, (3, 4, 9, 8))
    mask.save(tmp_path / "mask.png")
    paths = [str(tmp_path / name) for name in ("photo.png", "mask.png", "big-lama.pt", "out.png")]
    cli.main(["inpaint", paths[0], "--mask", paths[1], "--model", paths[2], "-o", paths[3]])
    with Image.open(paths[3]) as filled:
        assert filled.size == (20, 16)


class Runs:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_no_code_of_a_file_runs(new, tmp_path, capfd):
    """Calls of functions become empty objects; those of the system's modules are refused by name."""
    path = tmp_path / "lama.ckpt"
    harmless = {"state_dict": STATE, "a": Runs(print, "ran"), "b": Runs(eval, "print('ran')")}
    torch.save(harmless, path, _use_new_zipfile_serialization=new)
    assert holds(models.from_checkpoint(path), STATE)
    torch.save(harmless | {"c": Runs(os.system, "echo ran")}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=rf"it cannot be read without running code of {os.name}\.system \(readable: "):
        LaMa.from_checkpoint(path)
    assert "ran" not in "".join(capfd.readouterr())


def nested(path):
    packed(path, name="models/last.zip")
    outer = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("best.ckpt", outer.getvalue())


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lama/data.pkl", bytes(1 << 24))


def many(path):
    """Objects of so many classes that torch would search its list of them for minutes."""
    objects = b"".join(b"cmany\nC%d\n)R0" % i for i in range(5000))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lama/data.pkl", b"\x80\x02" + objects + b"N.")


def frozen(path):
    traced = script(Skeleton("model", nn.Conv2d(1, 1, 1)), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.freeze(traced.eval()).save(path)


def tarred(path):
    import tarfile

    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "pickle")


class Mapping(dict):
    """A dict that torch does not fill."""


LTE = {"imnet.layers.0.weight": torch.zeros(8, 256), "encoder.head.0.weight": torch.zeros(4, 3, 3, 3)}


def arrays(path):
    torch.save({"state_dict": {name: value.numpy() for name, value in STATE.items()}}, path)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (arrays, r"its entry model.1.ffc.convl2l.weight is of the type numpy.\S+reconstruct, not a tensor"),
        (lambda path: torch.save(Callback(), path), r"it holds a pickled object of the class \S+\.Callback instead"),
        (lambda path: torch.save({"state_dict": STATE, "x": Mapping(a=1)}, path), r"running code of \S+\.Mapping"),
        (
            lambda path: torch.save(LTE, path),
            "its imnet has 256 inputs, which are not 4 features, an offset and a cell",
        ),
        (lambda path: torch.save([1], path), "it has no state dict, but a value of the type list"),
        (lambda path: torch.save({"state_dict": 3}, path), "it has no state dict, but a value of the type int"),
        (lambda path: torch.save({"a": torch.ones(1)}, path), "its tensors belong to none of them"),
        (lambda path: packed(path, name="models/last.txt"), "it is a zip file with 0 checkpoints in it, not one"),
        (nested, "it is a zip file with 0 checkpoints in it, not one"),
        (bomb, "it has [0-9]+ bytes and would unpack to 16777216: weights do not compress like that"),
        (many, "it has 5000 objects of 5000 classes beside its weights"),
        (frozen, "it is a TorchScript archive without parameters"),
        (tarred, "it is a tar file, torch's format of before 2017"),
        (lambda path: path.write_bytes(b"PK\3\4 and nothing else"), "it is a damaged or truncated file of torch.save"),
        (lambda path: path.write_bytes(b"\x80\x04K\x01."), "it is a damaged pickle, or not one of torch.save"),
        (lambda path: path.write_bytes(b"hello"), "it is neither a safetensors file nor one of torch.save"),
        (lambda path: path.write_bytes(b""), "it is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_refusals_say_what_was_found_and_what_is_read(write, reason, tmp_path):
    path = tmp_path / "lama.ckpt"
    write(path)
    with pytest.raises(ValueError, match=reason) as error:
        models.from_checkpoint(path)
    text = str(error.value)
    assert re.fullmatch(r"\S+lama\.ckpt is not a .* checkpoint: .* \(readable: files that `save` wrote; .*\)", text)
    assert "weights_only" not in text and "\n" not in text
