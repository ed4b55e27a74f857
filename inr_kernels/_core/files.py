"""Files that are replaced as a whole or not at all. Imports nothing heavy: the command checks names with it at once."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

# Raised where a file can be written but not replaced: a bind mount, a read-only folder around a writable file.
_NOT_REPLACEABLE = {errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES, errno.EROFS}

TEMPORARY = ".inr-kernels-"  # how the names of unfinished files begin
CONFIG = "config.yaml"  # the file by which the folder of a training run is known


def check_path(path: object) -> None:
    """Raises TypeError unless path is a string, bytes or os.PathLike."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"path must be a string or os.PathLike; got {type(path).__name__}")


def replace_file(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` through a temporary file in its folder: an interruption leaves an older file intact.

    The file keeps its permissions. Symbolic links are followed. What cannot be replaced (a device, a named pipe, a
    bind mount, a file in a read-only folder) is written in place.

    Raises:
        OSError: the file cannot be written; its filename is `path`.
        TypeError: path is no path.
    """
    check_path(path)
    path = os.fsdecode(path)
    with _named(path):
        target = Path(os.path.realpath(path))
        try:
            if not _is_special(path):
                _replace(target, data)
                return
        except OSError as error:
            if error.errno not in _NOT_REPLACEABLE or not target.exists():
                raise
        Path(path).write_bytes(data)


def check_writable(path: str | os.PathLike) -> None:
    """Raises the error that `replace_file` would raise for a missing folder or permission; changes nothing.

    Raises:
        OSError, TypeError: see `replace_file`.
    """
    check_path(path)
    path = os.fsdecode(path)
    with _named(path):
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder; the output must be a file")
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder of the output does not exist")
        if _is_special(path) or (target.exists() and os.access(target, os.W_OK)):
            return
        handle, temporary = _create(target)
        os.close(handle)
        temporary.unlink()


def check_folder(path: str | os.PathLike) -> None:
    """Raises OSError if files cannot be written in a folder, or it cannot be made; changes nothing."""
    folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    with _named(path):
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder, or below a file")
        check_writable(folder / TEMPORARY)


def check_run(path: str | os.PathLike, resume: bool) -> None:
    """Checks the folder of a training run.

    Raises:
        FileExistsError: the run is new, and the folder not empty.
        FileNotFoundError: it is resumed, and there is none.
        OSError: files cannot be written there.
    """
    folder = Path(path)
    check_folder(folder)
    if resume and not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: there is no run to resume")
    if not resume and folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; add --resume to continue its run, or name another folder")


def _is_special(path: str | os.PathLike) -> bool:
    """Whether it is a device, a pipe or a socket. Not of the resolved path: /dev/stdout may resolve to no file."""
    return Path(path).exists() and not stat.S_ISREG(Path(path).stat().st_mode)


def _replace(target: Path, data: bytes) -> None:
    handle, temporary = _create(target)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _create(target: Path) -> tuple[int, Path]:
    """A new file in the target's folder, opened for writing.

    A random name and exclusive creation keep it apart from other threads' files and from symbolic links created by
    other users.
    """
    temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    mode = 0o600 if target.exists() else 0o666  # private until it has the old file's permissions
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0), mode), temporary


@contextlib.contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """Errors name the file that the caller named."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
