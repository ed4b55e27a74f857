"""Checkpoints: the header, files of older releases and of other libraries, `from_checkpoint` of all networks."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inr_kernels import models
from inr_kernels.models import DEAR, IN2, LIIF, DEARConfig, IN2Config, LaMa, LaMaConfig, LIIFConfig

NETWORKS = {
    "DEAR": lambda: DEAR(DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8))),
    "IN2": lambda: IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8))),
    "LaMa": lambda: LaMa(LaMaConfig(features=8, blocks=1, activation="tanh")),
    "LIIF": lambda: LIIF(LIIFConfig(blocks=1, features=4, hidden=(8, 8))),
}
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


@every_network
def test_another_networks_file(name, path):
    model = NETWORKS[name]()
    model.save(path)
    for other in models.NETWORKS:
        if not isinstance(model, other):
            article = "an" if name == "IN2" else "a"
            with pytest.raises(
                ValueError, match=rf"is not an? {other.NETWORK} checkpoint: it contains {article} {name}"
            ):
                other.from_checkpoint(path)


@pytest.mark.parametrize("network", [DEAR, IN2, LIIF])
def test_shipped_files_have_a_name(network):
    assert header(network.PRETRAINED)["network"] == network.NETWORK
    loaded, shipped = models.from_checkpoint(network.PRETRAINED), network.pretrained()
    assert equal(loaded, shipped) and loaded.notes["held_out"] == "skimage.data.coffee"


def test_lama_ships_no_file():
    with pytest.raises(ValueError, match="no LaMa checkpoint ships with the package"):
        LaMa.pretrained()


def test_lamas_own_files(tmp_path):
    model = LaMa(LaMaConfig(features=8, blocks=1))
    state = {f"generator.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state | {"discriminator.x": torch.ones(2)}, "epoch": 39}, tmp_path / "best.ckpt")
    torch.save({"state_dict": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), tmp_path / "generator.safetensors")
    for name in ("best.ckpt", "old.ckpt", "generator.safetensors"):
        loaded = models.from_checkpoint(tmp_path / name)
        assert equal(loaded, model) and loaded.config == model.config
    assert models.from_checkpoint(tmp_path / "best.ckpt", activation="tanh").config.activation == "tanh"


def test_liifs_own_files(tmp_path):
    model = NETWORKS["LIIF"]()
    encoder = {"name": "edsr-baseline", "args": {"no_upsampling": True, "n_resblocks": 1, "n_feats": 4}}
    args = {"encoder_spec": encoder, "imnet_spec": {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [8, 8]}}}
    torch.save({"model": {"name": "liif", "args": args, "sd": model.state_dict()}}, tmp_path / "liif.pth")
    assert equal(models.from_checkpoint(tmp_path / "liif.pth"), model)
    torch.save({"model": {"name": "lte", "args": args, "sd": {}}}, tmp_path / "lte.pth")
    with pytest.raises(ValueError, match=r"lte.pth is not a DEAR, IN2, LaMa or LIIF checkpoint: it contains a lte"):
        models.from_checkpoint(tmp_path / "lte.pth")


def test_a_pickle_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"state_dict": {"generator.x": torch.ones(1)}, "callbacks": Evil()}, tmp_path / "evil.ckpt")
    for network in (LaMa, LIIF, models):
        with pytest.raises(ValueError, match=r"evil.ckpt is not .* checkpoint: "):
            network.from_checkpoint(tmp_path / "evil.ckpt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", ""),
        (b"text, longer than nine bytes", ""),
        ({"weight": torch.zeros(2)}, "its tensors belong to none of them"),
        ([1], "it has no state dict"),
    ],
    ids=str,
)
def test_other_files(content, reason, tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=rf"other.ckpt is not a DEAR, IN2, LaMa or LIIF checkpoint: {reason}"):
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


@pytest.mark.parametrize("content", [b"hello there", b"", b"\x80\x02K\x01.", b"\x89PNG\r\n\x1a\n"])
def test_no_advice_to_run_the_code_of_a_file(tmp_path, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.pth is not a .* checkpoint: ") as error:
        models.from_checkpoint(path)
    assert "weights_only" not in str(error.value)
