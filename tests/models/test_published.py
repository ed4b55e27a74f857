"""Checkpoints of LaMa and LIIF in the forms in which others publish them, built from their own names of tensors."""

import argparse
import collections
import io
import itertools
import os
import re
import warnings
import zipfile

import numpy
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from inr_kernels import cli, models
from inr_kernels.models import LIIF, LaMa, LaMaConfig, LIIFConfig
from inr_kernels.models.liif import RDN

LAMA = LaMa(LaMaConfig(features=8, blocks=2))
STATE = LAMA.state_dict()


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def holds(model, state=STATE):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], value) for name, value in state.items())


class Callback:
    """Of a class that the reader may not know."""

    def __init__(self):
        self.best = numpy.float64(0.5)


LIGHTNING = {
    "state_dict": prefixed("generator.") | {"discriminator.model0.0.weight": torch.ones(2)},
    "epoch": 39,
    "hyper_parameters": argparse.Namespace(lr=numpy.float64(1e-3), sizes=numpy.arange(3)),
    "callbacks": {Callback: Callback()},
    "counts": collections.defaultdict(list, {"steps": collections.deque([1, 2])}),
}


class Skeleton(nn.Module):
    """Submodules at dotted names; its forward uses none of them, as tracing keeps their tensors all the same."""

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
    "doubled model.": lambda path: torch.save(prefixed("model."), path),
    "module.": lambda path: torch.save(prefixed("module."), path),
    "module.generator.": lambda path: torch.save({"state_dict": prefixed("module.generator.")}, path),
    "generator.module.": lambda path: torch.save({"state_dict": prefixed("generator.module.")}, path),
    "two generators": lambda path: torch.save(prefixed("ema.", STATE) | prefixed("generator."), path),
    "safetensors": lambda path: save_file(prefixed("generator."), path),
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
    path = tmp_path / "lama.pth.tar"  # the name says nothing
    LAMA_FILES[form](path)
    for model in (LaMa.from_checkpoint(path), models.from_checkpoint(str(path))):
        assert holds(model) and model.config == LAMA.config and not model.training


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
    assert holds(models.from_checkpoint(path))
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
        (bomb, "it has [0-9]+ bytes and would unpack to 16777216, which no weights do"),
        (frozen, "it is a TorchScript archive without parameters"),
        (tarred, "it is a tar file, torch's format of before 2017"),
        (lambda path: path.write_bytes(b"PK\3\4 and nothing else"), "it is a damaged or truncated file of torch.save"),
        (lambda path: path.write_bytes(b"\x80\x04K\x01."), "it is a damaged pickle, or not one of torch.save"),
        (lambda path: path.write_bytes(b"hello"), "it is neither a safetensors file nor one of torch.save"),
        (lambda path: path.write_bytes(b""), "it is empty"),
    ],
    ids=str,
)
def test_refusals_say_what_was_found_and_what_is_read(write, reason, tmp_path):
    path = tmp_path / "lama.ckpt"
    write(path)
    with pytest.raises(ValueError, match=reason) as error:
        models.from_checkpoint(path)
    text = str(error.value)
    assert re.fullmatch(r"\S+lama\.ckpt is not a .* checkpoint: .* \(readable: files that `save` wrote; .*\)", text)
    assert "weights_only" not in text and "\n" not in text


def conv(inputs, outputs, kernel):
    return {
        "weight": torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5,
        "bias": torch.randn(outputs),
    }


def layers(named):
    return {f"{name}.{part}": value for name, layer in named.items() for part, value in layer.items()}


def imnet(inputs, widths):
    sizes = [inputs, *widths, 3]
    return layers(
        {
            f"imnet.layers.{2 * i}": {"weight": torch.randn(b, a) / a**0.5, "bias": torch.randn(b)}
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        }
    )


def rdn_state(blocks, convolutions, growth, features, first, block, dense, fusion, last):
    """An RDN's state dict; the names are patterns of the two projects."""
    state = {first.format(1): conv(3, features, 3), first.format(2): conv(features, features, 3)}
    for i in range(blocks):
        for j in range(convolutions):
            state[dense.format(i, j)] = conv(features + growth * j, growth, 3)
        state[block.format(i)] = conv(features + growth * convolutions, features, 1)
    return layers(state | {fusion: conv(blocks * features, features, 1), last: conv(features, features, 3)})


YINBOC = (
    "encoder.SFENet{}",
    "encoder.RDBs.{}.LFF",
    "encoder.RDBs.{}.convs.{}.conv.0",
    "encoder.GFF.0",
    "encoder.GFF.1",
)
MMAGIC = ("sfe{}", "rdbs.{}.lff", "rdbs.{}.layers.{}.conv", "gff.0", "gff.1")


def rdn(state, image, blocks, convolutions, first, block, dense, fusion, last):
    """RDN by its definition."""

    def run(name, x):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[2] // 2)

    shallow = run(first.format(1), image)
    x, outputs = run(first.format(2), shallow), []
    for i in range(blocks):
        y = x
        for j in range(convolutions):
            y = torch.cat((y, run(dense.format(i, j), y).relu()), 1)
        x = x + run(block.format(i), y)
        outputs.append(x)
    return shallow + run(last, run(fusion, torch.cat(outputs, 1)))


def spec(state, encoder, hidden, **flags):
    """A file of yinboc/liif's trainer."""
    args = {"encoder_spec": encoder, "imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": hidden}}}
    return {"model": {"name": "liif", "args": args | flags, "sd": state}, "optimizer": {"sd": {}}, "epoch": 1000}


@torch.no_grad()
def test_yinbocs_rdn(tmp_path):
    """Configuration A, of 20 blocks of 6 layers that add 32 channels."""
    state = rdn_state(20, 6, 32, 8, *YINBOC) | imnet(8 * 9 + 4, [16, 12])
    encoder = {"name": "rdn", "args": {"G0": 8, "RDNconfig": "A", "no_upsampling": True}}
    torch.save(spec(state, encoder, [16, 12]), tmp_path / "rdn-liif.pth")
    model = LIIF.from_checkpoint(tmp_path / "rdn-liif.pth")
    config = {"encoder": "rdn", "blocks": 20, "convolutions": 6, "growth": 32, "features": 8, "hidden": (16, 12)}
    assert model.config == LIIFConfig(**config) and holds(model, state)
    image = torch.randn(1, 3, 7, 9)
    torch.testing.assert_close(model.gen_feat(image), rdn(state, image, 20, 6, *YINBOC), rtol=1e-4, atol=1e-4)
    model.save(tmp_path / "own.safetensors")
    assert holds(models.from_checkpoint(tmp_path / "own.safetensors"), state)


def test_the_published_rdn():
    """Configuration B with yinboc/liif's decoder."""
    with torch.device("meta"):
        model = LIIF(LIIFConfig(encoder="rdn"))
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes["encoder.RDBs.15.convs.7.conv.0.weight"] == [64, 512, 3, 3]
    assert shapes["encoder.RDBs.15.LFF.weight"] == [64, 576, 1, 1] and shapes["encoder.GFF.0.weight"] == [
        64,
        1024,
        1,
        1,
    ]
    assert sum(p.numel() for p in model.parameters()) == 22_320_835


@torch.no_grad()
def test_rdn_tiles_are_exact():
    encoder, image = RDN(2, 4, 4, 2).double(), torch.randn(1, 3, 40, 50, dtype=torch.double)
    torch.testing.assert_close(encoder.tiled(image, workspace=1), encoder(image), rtol=0, atol=1e-13)


@torch.no_grad()
def test_mmagics_rdn(tmp_path):
    state = rdn_state(2, 3, 5, 4, *MMAGIC) | imnet(4 * 9 + 4, [16])
    torch.save({"meta": {"iter": 1}, "state_dict": prefixed("generator.", state)}, tmp_path / "liif_rdn.pth")
    model = models.from_checkpoint(tmp_path / "liif_rdn.pth")
    config = {"encoder": "rdn", "blocks": 2, "convolutions": 3, "growth": 5, "features": 4, "hidden": (16,)}
    assert model.config == LIIFConfig(**config)
    image = torch.randn(1, 3, 7, 9)
    torch.testing.assert_close(model.gen_feat(image), rdn(state, image, 2, 3, *MMAGIC), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.imnet.layers[2].weight, state["imnet.layers.2.weight"])


@pytest.mark.parametrize("kind", ["state_dict", "bare", "safetensors"])
@pytest.mark.parametrize(("unfold", "cell"), [(True, True), (True, False), (False, True), (False, False)])
@torch.no_grad()
def test_mmagics_edsr(kind, unfold, cell, tmp_path):
    named = {"conv_first": conv(3, 8, 3), "conv_after_body": conv(8, 8, 3)}
    named |= {f"body.{i}.conv{j}": conv(8, 8, 3) for i in range(3) for j in (1, 2)}
    state = layers(named) | imnet(8 * (9 if unfold else 1) + (4 if cell else 2), [16, 12])
    path = tmp_path / "liif_edsr.pth"
    if kind == "state_dict":
        torch.save({"meta": {}, "state_dict": prefixed("generator.", state), "message_hub": Callback()}, path)
    else:
        (save_file if kind == "safetensors" else torch.save)(state, path)
    model = models.from_checkpoint(path)
    expected = LIIFConfig(blocks=3, features=8, hidden=(16, 12), feat_unfold=unfold, cell_decode=cell)
    assert model.config == expected
    image = torch.randn(1, 3, 7, 9)

    def run(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    head = x = run("conv_first", image)
    for i in range(3):
        x = x + run(f"body.{i}.conv2", run(f"body.{i}.conv1", x).relu())
    torch.testing.assert_close(model.gen_feat(image), head + run("conv_after_body", x), rtol=1e-4, atol=1e-4)


def test_a_bare_state_dict_of_yinbocs(tmp_path):
    for config in (
        LIIFConfig(blocks=2, features=8, hidden=(16,)),
        LIIFConfig(encoder="rdn", blocks=1, features=4, growth=3),
    ):
        model = LIIF(config)
        torch.save(model.state_dict(), tmp_path / "liif.pth")
        loaded = models.from_checkpoint(tmp_path / "liif.pth")
        assert holds(loaded, model.state_dict()) and loaded.encoder.halo == model.encoder.halo
