"""What `bench/gpu_record.sh` needs, and what is missing of it: `python bench/preflight.py PART...`. Uses Python alone.

Prints a line for each missing package or tool, all at once: what it is for, and how to get it. The exit status is 2 if
a part cannot run without one of them, else 0.
"""

import importlib.metadata
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BUILD, PROVE, TESTS, BENCH = PARTS = "build", "prove", "tests", "bench"


class Need(NamedTuple):
    """A package or a tool.

    Args:
        name: of the distribution, or of the command.
        parts: that need it.
        without: what is left out without it; "" if the parts cannot run.
        at_least: its major version, of a package.
        tool: whether it is a command.
    """

    name: str
    parts: tuple[str, ...]
    without: str = ""
    at_least: int = 0
    tool: bool = False


CUDA_AND_CPP = "the C++ and CUDA kernels are not built; Triton's run"
NEEDS = [
    *(Need(name, (PROVE, TESTS, BENCH)) for name in ("torch", "triton", "numpy", "pillow", "safetensors", "tqdm")),
    *(Need(name, (PROVE, TESTS, BENCH)) for name in ("platformdirs", "filelock")),
    Need("pytest", (TESTS, BENCH), at_least=8),
    Need("pytest-benchmark", (BENCH,)),
    Need("cmake", (BUILD,), CUDA_AND_CPP, tool=True),
    Need("c++", (BUILD,), CUDA_AND_CPP, tool=True),
    Need("nvcc", (BUILD,), "the CUDA kernels are not built; Triton's run", tool=True),
    Need("compute-sanitizer", (TESTS,), "invalid accesses and races are not checked", tool=True),
    Need("matplotlib", (BENCH,), "no plots"),
]


def is_there(need: Need) -> bool:
    """Whether the package is installed, in a version that serves, or the tool found."""
    if need.tool:
        places = sorted(Path("/usr/local").glob(f"cuda*/bin/{need.name}"))
        return bool(shutil.which(need.name) or (need.name == "compute-sanitizer" and places))
    try:
        found = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return int(re.match(r"\d+", found)[0]) >= need.at_least


def missing(parts: list[str]) -> Iterator[Need]:
    """What the parts need and this machine does not have."""
    yield from (need for need in NEEDS if set(need.parts) & set(parts) and not is_there(need))


def pybind11() -> str:
    """The option for CMake that says where pybind11 is: installed, or the headers that torch carries; "" if nowhere."""
    found = importlib.util.find_spec("pybind11")
    if found and found.origin and int(importlib.metadata.version("pybind11").split(".")[0]) >= 3:
        return f"-Dpybind11_DIR={Path(found.origin).parent / 'share/cmake/pybind11'}"
    found = importlib.util.find_spec("torch")
    headers = Path(found.origin).parent / "include" if found and found.origin else Path()
    return f"-DINR_PYBIND11_INCLUDE={headers}" if (headers / "pybind11").is_dir() else ""


def main(arguments: list[str]) -> int:
    """Prints what is missing, or, for `--pybind11`, that option."""
    if arguments == ["--pybind11"]:
        print(pybind11())
        return 0
    found = list(missing(arguments))
    for need in found:
        version = f" >= {need.at_least}" if need.at_least else ""
        kind = "optional" if need.without else "needed"
        print(f"MISSING {need.name}{version}, {kind}: {need.without or 'for ' + ', '.join(need.parts)}")
    required = [f"{n.name}>={n.at_least}" if n.at_least else n.name for n in found if not n.without]
    if required:
        print("to install what is needed: pip install " + " ".join(f"'{name}'" for name in required))
    return 2 if required else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
