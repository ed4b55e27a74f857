"""Checkpoints: the header, files of older releases and of other libraries, `from_checkpoint` of all networks."""

import argparse
import fractions
import functools
import json
import os
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_networks import NETWORKS

from inr_kernels import models
from inr_kernels.models import DEAR, IN2, LIIF, ImplicitAutoencoder, LaMa, LIIFConfig
from inr_kernels.models.common import checkpoints, torch_files

every_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def equal(model, other):
    a, b = model.state_dict(), other.state_dict()
    return type(model) is type(other) and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path, **changes):
    """Writes the file again with another header; None removes a key."""
    metadata = header(path) | changes
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None} or None)


@every_network
def test_round_trip(name, path):
    model = NETWORKS[name]()
    model.save(path, {"steps": 3})
    assert header(path).keys() == {"format_version", "network", "config", "notes"}
    assert header(path)["network"] == name and json.loads(header(path)["notes"]) == {"steps": 3}
    for loaded in (type(model).from_checkpoint(path), models.from_checkpoint(str(path))):
        assert equal(loaded, model) and loaded.config == model.config and loaded.notes == {"steps": 3}
        assert not loaded.training
    loaded.save(path)
    assert json.loads(header(path)["notes"]) == {"steps": 3}
    loaded.save(path, {})
    assert json.loads(header(path)["notes"]) == {}


@every_network
def test_files_of_older_releases(name, path):
    """They have no name: the state dict's keys identify the network."""
    model = NETWORKS[name]()
    model.save(path)
    rewrite(path, network=None, format_version=None)
    assert equal(type(model).from_checkpoint(path), model)
    assert equal(models.from_checkpoint(path), model)


def test_errors_do_not_control_the_terminal(path):
    NETWORKS["DEAR"]().save(path)
    rewrite(path, network="\x1b[31mred")
    with pytest.raises(ValueError, match=r"\\x1b\[31mred") as raised:
        models.from_checkpoint(path)
    assert str(raised.value).isprintable()


@every_network
def test_another_networks_file(name, path):
    model = NETWORKS[name]()
    model.save(path)
    for other in models.NETWORKS:
        if not isinstance(model, other):
            match = rf"is not an? {other.NETWORK} checkpoint: it contains the network {name}"
            with pytest.raises(ValueError, match=match):
                other.from_checkpoint(path)


@pytest.mark.parametrize("network", [DEAR, IN2, LIIF, ImplicitAutoencoder])
def test_shipped_files_have_a_name(network):
    assert header(network.PRETRAINED)["network"] == network.NETWORK
    loaded, shipped = models.from_checkpoint(network.PRETRAINED), network.pretrained()
    assert equal(loaded, shipped) and "skimage.data.coffee" in loaded.notes["held_out"]


def test_lama_ships_no_file():
    with pytest.raises(ValueError, match="no LaMa checkpoint ships with the package"):
        LaMa.pretrained()


def changed_config(path, **changes):
    rewrite(path, config=json.dumps(json.loads(header(path)["config"]) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("DEAR", {"blocks": 10_000_000}, "its config has 10000003 layers, but the file only 34 tensors"),
        ("IN2", {"groups": 10_000_000}, "its config has 10000004 layers, but the file only 183 tensors"),
        ("ImplicitAutoencoder", {"blocks": 10**7}, "its config has 10000002 layers, but the file only 22 tensors"),
        ("ImplicitAutoencoder", {"latent": "none"}, "in its config latent must be one of global, local; got 'none'"),
        ("LaMa", {"downsamplings": 10_000_000}, "its config has 10000001 layers, but the file only 105 tensors"),
        ("LIIF", {"encoder": "rdn", "convolutions": 10**9}, "its config has 1000000002 layers, but the file only 18"),
        ("LIIF", {"hidden": [8] * 1000}, "its config has 1001 layers, but the file only 18 tensors"),
        ("DEAR", {"blocks": 1e30}, r"the blocks in its config must be an integer of at least 0; got 1e\+30"),
        ("IN2", {"blocks": -1}, "the blocks in its config must be an integer of at least 0; got -1"),
        ("IN2", {"ratio": float("nan")}, "the ratio in its config must be a finite number; got nan"),
        ("LIIF", {"cell_decode": 1}, "the cell_decode in its config must be true or false; got 1"),
        ("LIIF", {"hidden": "abc"}, "the hidden in its config must be a list of integers; got abc"),
        ("LIIF", {"features": 10**12}, "no LIIF can be made of its config"),
        (
            "LIIF",
            {"features": 5},
            r"its tensor imnet.layers.0.weight has the shape \[8, 40\]; its config needs \[8, 49\]",
        ),
        ("DEAR", {"channels": 10**12}, "no DEAR can be made of its config"),
        ("DEAR", {"fill": "red"}, "in its config fill must be one of zeros, smooth; got 'red'"),
        ("IN2", {"heads": 0}, "in its config heads must divide 16 channels; got 0"),
        ("IN2", {"norm": "none"}, "it has a tensor encoder.0.*, which its config does not need"),
        ("LaMa", {"blocks": 2}, "it has no tensor model.6.conv1.*, which its config needs"),
        ("LaMa", {"max_features": 10**12, "features": 10**9}, "no LaMa can be made of its config"),
        ("LaMa", {"activation": "relu"}, "in its config activation must be one of sigmoid, tanh, none; got relu"),
        ("DEAR", {"colour": 1}, "its config has the entry 'colour', which a DEAR does not have"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_tensors(name, changes, reason, path):
    """Refused before anything of its size is made."""
    model = NETWORKS[name]()
    model.save(path)
    changed_config(path, **changes)
    with pytest.raises(ValueError, match=rf"net.safetensors is not an? {name} checkpoint: {reason}"):
        type(model).from_checkpoint(path)


@pytest.mark.parametrize("config", ["[1]", "{", "3", "[" * 100_000], ids=lambda text: text[:3])
def test_a_config_that_is_no_json_object(config, path):
    NETWORKS["DEAR"]().save(path)
    rewrite(path, config=config)
    with pytest.raises(ValueError, match=r"is not a DEAR checkpoint: (its config is not a JSON object|the config or)"):
        DEAR.from_checkpoint(path)


def test_tensors_that_are_larger_than_their_file(tmp_path):
    """A tensor may declare any size if its strides are 0."""
    with torch.device("meta"):
        model = LIIF(LIIFConfig(blocks=1, features=100_000, hidden=(8,)))
    state = {name: torch.zeros(()).expand(value.shape) for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "liif.pth")
    with pytest.raises(ValueError, match=r"its tensors have 27\d{10} elements, but the file only \d+ bytes"):
        LIIF.from_checkpoint(tmp_path / "liif.pth")


def test_liifs_own_files(tmp_path):
    model = NETWORKS["LIIF"]()
    encoder = {"name": "edsr-baseline", "args": {"no_upsampling": True, "n_resblocks": 1, "n_feats": 4}}
    args = {"encoder_spec": encoder, "imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [8, 8]}}}
    torch.save({"model": {"name": "liif", "args": args, "sd": model.state_dict()}}, tmp_path / "liif.pth")
    assert equal(models.from_checkpoint(tmp_path / "liif.pth"), model)
    torch.save({"model": {"name": "jiif", "args": args, "sd": {}}}, tmp_path / "jiif.pth")
    with pytest.raises(
        ValueError, match=r"jiif.pth is not a DEAR, .* or LIIF checkpoint: it contains the network jiif"
    ):
        models.from_checkpoint(tmp_path / "jiif.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"text, longer than nine bytes", "it is neither a safetensors file nor one of torch.save"),
        (b"12345678{", "it is a damaged or truncated safetensors file"),
        ({"weight": torch.zeros(2)}, "its tensors belong to none of them"),
        ([1], "it has no state dict, but a value of the type list"),
    ],
    ids=str,
)
def test_other_files(content, reason, tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    networks = "DEAR, IN2, ImplicitAutoencoder, LaMa, LTE or LIIF"
    with pytest.raises(ValueError, match=rf"other.ckpt is not a {networks} checkpoint: {reason}"):
        models.from_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        models.from_checkpoint(tmp_path / "none.ckpt")


def test_a_later_format(path):
    NETWORKS["DEAR"]().save(path)
    rewrite(path, format_version="2")
    with pytest.raises(ValueError, match="its format version is 2; this release reads up to 1"):
        models.from_checkpoint(path)


def test_options(path):
    NETWORKS["DEAR"]().save(path)
    assert models.from_checkpoint(path, eager=True).eager and DEAR.pretrained(eager=True).eager
    with pytest.warns(DeprecationWarning, match="reference= was renamed"):
        assert DEAR.from_checkpoint(path, reference=True).eager


@pytest.mark.parametrize(
    ("name", "option", "supported"),
    [
        ("DEAR", "eagre", "eager, reference"),
        ("IN2", "activation", "eager, reference"),
        ("ImplicitAutoencoder", "latent", "eager"),
        ("LaMa", "eager", "activation"),
        ("LIIF", "eager", "none"),
    ],
)
def test_unsupported_options(name, option, supported, path):
    """The error names the network in the file and its options."""
    model = NETWORKS[name]()
    model.save(path)
    for load in (models.from_checkpoint, type(model).from_checkpoint):
        with pytest.raises(TypeError, match=f"{name} has no option {option}; its options are: {supported}"):
            load(path, **{option: True})


def test_dtype_applies_to_floating_point_tensors(path):
    NETWORKS["IN2"]().save(path, dtype=torch.float16)
    dtypes = {key.split(".")[-1]: value.dtype for key, value in load_file(path).items()}
    assert dtypes.pop("num_batches_tracked") == torch.int64 and set(dtypes.values()) == {torch.float16}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"dtype": "bfloat16"},
            TypeError,
            "dtype must be a torch.dtype such as torch.bfloat16, or None; got 'bfloat16'",
        ),
        ({"dtype": torch.int8}, ValueError, "dtype must be a floating-point type; got torch.int8"),
        (
            {"notes": object()},
            TypeError,
            "notes must be a JSON value .*; Object of type object is not JSON serializable",
        ),
        ({"notes": {(1, 2): 3}}, TypeError, "notes must be a JSON value"),
    ],
)
def test_save_checks_its_arguments(options, kind, message, path):
    with pytest.raises(kind, match=message):
        NETWORKS["LIIF"]().save(path, **options)
    assert not path.exists()


@pytest.mark.parametrize("path", [12345, None, 1.5, torch.zeros(1)], ids=lambda path: type(path).__name__)
def test_a_path_that_is_none(path):
    model = NETWORKS["LIIF"]()
    export = functools.partial(models.export_onnx, model)
    for function in (models.from_checkpoint, LaMa.from_checkpoint, model.save, export):
        with pytest.raises(TypeError, match=rf"path must be a string or os.PathLike; got {type(path).__name__}"):
            function(path)


def test_a_path_of_bytes(path):
    model = NETWORKS["LIIF"]()
    model.save(os.fsencode(path))
    assert equal(models.from_checkpoint(os.fsencode(path)), model)


@pytest.mark.parametrize("kind", ["safetensors", "torch.save", "torch.save before 1.6"])
def test_a_pipe_is_read_once(kind, tmp_path):
    model, pipe = NETWORKS["LaMa"](), tmp_path / "pipe"
    if kind == "safetensors":
        model.save(tmp_path / "file")
    else:
        torch.save(model.state_dict(), tmp_path / "file", _use_new_zipfile_serialization=kind == "torch.save")
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes((tmp_path / "file").read_bytes()))
    writer.start()
    assert equal(models.from_checkpoint(pipe), model)
    writer.join()


def test_a_file_that_cannot_be_read():
    """An error of the disk is no damage of the file. This one can be opened, but not be read at its start."""
    with pytest.raises(OSError, match=r"\[Errno 5\] Input/output error: '/proc/self/mem'"):
        models.from_checkpoint("/proc/self/mem")


def test_classes_that_the_caller_allows_are_not_used(tmp_path, monkeypatch):
    """They would run code; and what they make is no plain data."""
    model = NETWORKS["LaMa"]()
    torch.save({"state_dict": model.state_dict(), "options": argparse.Namespace(a=1)}, tmp_path / "lama.ckpt")
    before, seen, load = torch.serialization.get_safe_globals(), [], torch.load

    def watched(*args, **options):
        seen.extend(torch.serialization.get_safe_globals())
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", watched)
    with torch.serialization.safe_globals([argparse.Namespace, fractions.Fraction]):
        data = checkpoints.load_data(tmp_path / "lama.ckpt")
        assert isinstance(data["options"], torch_files.Placeholder)
        assert {argparse.Namespace, fractions.Fraction} <= {*torch.serialization.get_safe_globals()}
    assert {*torch.serialization.get_safe_globals()} == {*before}
    assert fractions.Fraction in seen and argparse.Namespace not in seen  # others stay, for other threads


@pytest.mark.parametrize("load", [models.from_checkpoint, LaMa.from_checkpoint])
def test_an_option_with_a_wrong_value_is_not_the_files_fault(load, path):
    torch.save(NETWORKS["LaMa"]().state_dict(), path)
    with pytest.raises(ValueError, match=r"^activation must be one of sigmoid, tanh, none; got relu$"):
        load(path, activation="relu")


@pytest.mark.parametrize("content", [b"hello there", b"", b"\x80\x02K\x01.", b"\x89PNG\r\n\x1a\n"])
def test_no_advice_to_run_the_code_of_a_file(tmp_path, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.pth is not a .* checkpoint: ") as error:
        models.from_checkpoint(path)
    assert "weights_only" not in str(error.value)
