"""The tests of the ops that reach every loop and border of the C++ kernels, to run them with another build."""

import importlib
import re

from tree import OPS as FOLDERS
from tree import ROOT

OPS = [*FOLDERS, "local_texture", "mlp"]
# Names or parts of names of the tests in the files of each op.
NAMES = {op: importlib.import_module(f"{op}_cases").SANITIZED for op in OPS}

# Modules of an op's folder that the C++ kernels do not depend on.
NOT_CALLED = {"triton_kernels", "problems"}


def arguments(*ops):
    """For pytest: which tests of these ops run, or of all."""
    ops = ops or OPS
    chosen = " or ".join(f"({op} and ({' or '.join(NAMES[op])}))" for op in ops)
    return ["-k", f"({chosen}) and not triton", *(str(ROOT / file) for op in ops for file in _tests(op))]


def _tests(op):
    names = [f"tests/ops/test_{op}{suffix}.py" for suffix in ("", "_contract", "_conv2d")]
    return [name for name in names if (ROOT / name).exists()]


def missing(output, ops):
    """The patterns of the ops' tests that did not pass. output: of `pytest -v`"""
    needed = [rf"test_{op}(_contract|_conv2d)?\.py::.*{name}.* PASSED" for op in ops for name in NAMES[op]]
    return [pattern for pattern in needed if not re.search(pattern, output)]


def files(op):
    """Patterns of the files that the op's tests depend on: its kernels, what calls them, and the tests."""
    folder = op if op in FOLDERS else "local_implicit"  # local_texture and mlp are parts of it
    patterns = ["CMakeLists.txt", "csrc/*.*", "csrc/common/*", "csrc/cpu/*.h", "csrc/cpu/common/*"]
    patterns += [f"csrc/cpu/{folder}/*", "inr_kernels/_core/*.py"]
    python = sorted(ROOT.glob(f"inr_kernels/{folder}/**/*.py"))
    patterns += [str(path.relative_to(ROOT)) for path in python if not {*path.parts, path.stem} & NOT_CALLED]
    return [*patterns, "tests/support/native_tests.py", f"tests/support/{op}_cases.py", *_tests(op)]
