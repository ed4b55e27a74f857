"""Networks as folders and repositories of the Hugging Face Hub, without a network: `hub` and what calls it."""

import json
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from small_networks import NETWORKS

from inr_kernels import models
from inr_kernels.models import DEAR, IN2, LIIF, LaMa
from inr_kernels.models.common import hub


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Every request raises OfflineModeIsEnabled."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def equal(model, other):
    a, b = model.state_dict(), other.state_dict()
    same = type(model) is type(other) and model.config == other.config and a.keys() == b.keys()
    return same and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_in_a_folder(name, tmp_path):
    model, folder = NETWORKS[name](), tmp_path / "new" / "folder"
    model.notes = {"steps": 3}
    assert model.save_pretrained(folder) is None
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    for loaded in (type(model).from_pretrained(folder), type(model).from_pretrained(str(folder))):
        assert equal(loaded, model) and loaded.notes == {"steps": 3} and not loaded.training
    assert equal(models.from_checkpoint(folder / "model.safetensors"), model)
    assert json.loads((folder / "config.json").read_text())["network"] == name
    card = (folder / "README.md").read_text()
    assert "library_name: inr-kernels\n" in card and f"# {name}\n" in card and '"steps": 3' in card


def test_an_existing_card_is_kept_and_weights_are_replaced(tmp_path):
    first, second = NETWORKS["LIIF"](), NETWORKS["LIIF"]()
    first.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    second.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and equal(LIIF.from_pretrained(tmp_path), second)


def test_options_and_other_files(tmp_path):
    model = NETWORKS["IN2"]()
    model.save_pretrained(tmp_path)
    assert IN2.from_pretrained(tmp_path, eager=True).eager
    with pytest.raises(TypeError, match="IN2 has no option activation"):
        IN2.from_pretrained(tmp_path, activation="tanh")
    lama = NETWORKS["LaMa"]()
    torch.save({f"generator.{name}": value for name, value in lama.state_dict().items()}, tmp_path / "best.ckpt")
    assert equal(LaMa.from_pretrained(tmp_path, filename="best.ckpt", activation="tanh"), lama)


def test_a_repository_in_the_cache(tmp_path):
    """The cache's layout is huggingface_hub's, so no request is needed."""
    model, commit = NETWORKS["DEAR"](), "0123456789" * 4
    repository = tmp_path / "models--user--dear"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    assert equal(DEAR.from_pretrained("user/dear", cache_dir=tmp_path, local_files_only=True), model)
    assert equal(DEAR.from_pretrained("user/dear", cache_dir=tmp_path, revision=commit), model)


def test_uploads_the_folder(tmp_path, monkeypatch):
    model, sent = NETWORKS["LIIF"](), []

    def upload(self, *, folder_path, repo_id, **_):
        sent.append((repo_id, equal(LIIF.from_pretrained(folder_path), model)))
        return "address"

    class Repository:
        repo_id = "user/liif"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert model.push_to_hub("user/liif") == "address"
    assert model.save_pretrained(tmp_path, push_to_hub=True, repo_id="user/liif") == "address"
    assert sent == [("user/liif", True)] * 2


def test_errors_are_one_sentence(tmp_path):
    model = NETWORKS["LIIF"]()
    calls = {
        "user/liif is no folder, and its model.safetensors cannot be fetched": lambda: LIIF.from_pretrained(
            "user/liif", cache_dir=tmp_path
        ),
        "a/b/c is no folder": lambda: LIIF.from_pretrained("a/b/c"),
        "user/liif cannot be uploaded: ": lambda: model.push_to_hub("user/liif"),
        "new cannot be uploaded: ": lambda: model.save_pretrained(tmp_path / "new", push_to_hub=True, repo_id="a/b"),
    }
    for message, call in calls.items():
        with pytest.raises(OSError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    model.save(tmp_path / "model.pth")
    with pytest.raises(NotADirectoryError, match=r"model.pth must be a folder .*; from_checkpoint opens a file"):
        LIIF.from_pretrained(tmp_path / "model.pth")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        LIIF.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a DEAR checkpoint: it contains the network LIIF"):
        DEAR.from_pretrained(tmp_path, filename="model.pth")
    with pytest.raises(TypeError, match=r"path must be a string or os\.PathLike; got int"):
        LIIF.from_pretrained(3)


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub._mixin.cache_clear()
    model, match = NETWORKS["LIIF"](), r"need huggingface_hub: pip install 'inr-kernels\[hub\]'"
    calls = (model.save_pretrained, model.push_to_hub, LIIF.from_pretrained)
    for call in calls:
        with pytest.raises(ImportError, match=match):
            call(str(tmp_path))


def test_importing_the_networks_does_not_import_it():
    code = "import sys, inr_kernels.models; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
