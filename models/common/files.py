"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path):
    """A temporary name beside `path`: what was written there takes its place when the block ends well.

    Otherwise it is removed, and an older file stays as it was. A link stays one: what it points at is replaced.
    """
    path = Path(os.path.realpath(path))
    # Not from the name: that may be as long as the file system takes.
    temporary = path.with_name(f".inr-kernels-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
