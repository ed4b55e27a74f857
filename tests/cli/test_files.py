"""Atomic writing of files."""

import os

import pytest

from inr_kernels.models.common.files import atomic_write


@pytest.mark.parametrize("name", ["a.png", "no suffix", "o" * 251 + ".png"])
def test_any_valid_name(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == (tmp_path / name).suffix  # libraries choose the format by it
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "new"}


def test_a_failure_keeps_the_existing_file(tmp_path):
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "old"


def test_a_symbolic_link_is_kept(tmp_path):
    (tmp_path / "folder").mkdir()
    kept, link = tmp_path / "folder" / "a.png", tmp_path / "link.png"
    kept.write_text("old")
    link.symlink_to(kept)
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and kept.read_text() == "new"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.png", "folder", "link.png"]
