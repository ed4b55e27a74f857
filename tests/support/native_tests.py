"""The tests of the ops that reach every loop and border of the C++ kernels, to run them with another build."""

import importlib
import re

from tree import OPS as FOLDERS
from tree import ROOT

OPS = [*FOLDERS, "local_texture"]
# Names or parts of names of the tests in the files of each op.
NAMES = {op: importlib.import_module(f"{op}_cases").SANITIZED for op in OPS}


def arguments():
    """For pytest: which tests run."""
    chosen = " or ".join(f"({op} and ({' or '.join(names)}))" for op, names in NAMES.items())
    tests = [ROOT / "tests/ops" / f"test_{op}{suffix}.py" for op in OPS for suffix in ("", "_contract")]
    return ["-k", f"({chosen}) and not triton", *(str(path) for path in tests if path.exists())]


def missing(output):
    """The patterns of tests that did not pass. output: of `pytest -v`"""
    needed = [rf"test_{op}(_contract)?\.py::.*{name}.* PASSED" for op, names in NAMES.items() for name in names]
    return [pattern for pattern in needed if not re.search(pattern, output)]
