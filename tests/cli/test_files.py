"""replace_file: a file is replaced as a whole or not at all, whatever stands in its place."""

import errno
import os
import stat
import threading

import pytest

from inr_kernels._core import files
from inr_kernels._core.files import check_writable, replace_file


@pytest.mark.parametrize("name", ["a.png", "no suffix", "o" * 251 + ".png"])
def test_writes_a_new_file(tmp_path, name):
    check_writable(tmp_path / name)
    assert not os.listdir(tmp_path)
    replace_file(tmp_path / name, b"new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "new"}


def test_an_interruption_keeps_the_older_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "a.png").write_text("older")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "a.png", b"new")
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_text() == "older"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664, 0o755])
def test_keeps_the_permissions(tmp_path, mode):
    path = tmp_path / "a.png"
    path.write_text("older")
    path.chmod(mode)
    replace_file(path, b"new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        replace_file(tmp_path / "a.png", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o666 & ~mask


def test_follows_a_link(tmp_path):
    kept, link = tmp_path / "folder" / "a.png", tmp_path / "link.png"
    kept.parent.mkdir()
    kept.write_text("older")
    link.symlink_to(kept)
    replace_file(link, b"new")
    assert link.is_symlink() and kept.read_text() == "new"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.png", "folder", "link.png"]


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Not even one with the name of the temporary file."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "known")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".inr-kernels-known").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError) as error:
        replace_file(tmp_path / "a.png", b"new")
    assert error.value.filename == str(tmp_path / "a.png") and (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_what_cannot_be_renamed_onto_is_written_in_place(tmp_path, monkeypatch, number):
    def replace(source, target):
        raise OSError(number, os.strerror(number), source, target)

    path = tmp_path / "a.png"
    path.write_text("an older and longer text")
    inode = path.stat().st_ino
    monkeypatch.setattr(os, "replace", replace)
    replace_file(path, b"new")
    assert path.read_text() == "new" and path.stat().st_ino == inode and os.listdir(tmp_path) == ["a.png"]


def test_a_file_in_a_read_only_folder_is_written_in_place(tmp_path, monkeypatch):
    def create(target):
        raise OSError(errno.EROFS, "Read-only file system", "a temporary name")

    path = tmp_path / "a.png"
    path.write_text("older")
    monkeypatch.setattr(files, "_create", create)  # root may write everywhere
    check_writable(path)
    replace_file(path, b"new")
    assert path.read_text() == "new"
    for write in (check_writable, lambda path: replace_file(path, b"new")):
        with pytest.raises(OSError, match="Read-only") as error:
            write(tmp_path / "b.png")
        assert error.value.filename == str(tmp_path / "b.png")


def test_a_named_pipe_stays_one(tmp_path):
    pipe, got = tmp_path / "pipe.png", []
    os.mkfifo(pipe)
    check_writable(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    replace_file(pipe, b"new")
    reader.join()
    assert got == [b"new"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_errors_name_the_callers_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name, message in (("folder.png", "is a folder"), ("none/a.png", "the folder of the output does not exist")):
        with pytest.raises(OSError, match=message) as error:
            check_writable(tmp_path / name)
        assert error.value.filename == str(tmp_path / name)


def test_threads_that_write_into_one_folder(tmp_path):
    def write(name):
        for _ in range(50):
            replace_file(tmp_path / name, name.encode() * 1000)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name * 1000 for name in "abcd"}
