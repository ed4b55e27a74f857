"""Atomic writing of files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, whose file replaces `path` when the block ends without an exception.

    After an exception the temporary file is removed, and an existing file is unchanged. If `path` is a symbolic link,
    its target is replaced.
    """
    path = Path(os.path.realpath(path))
    # Not derived from the name, which may already have the file system's maximum length.
    temporary = path.with_name(f".inr-kernels-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
