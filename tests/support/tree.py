"""The files of the repository, for the tests of its layout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
TEXT = CODE | {".cff", ".cfg", ".json", ".md", ".sh", ".svg", ".toml", ".txt", ".yaml", ".yml"}
FOLDERS = ["csrc", "inr_kernels", "models", "bench", "docs", "tests"]


def files(*folders, suffixes=CODE):
    """The files below the folders, as paths relative to the root: readable test ids."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [str(path.relative_to(ROOT)) for path in sorted(found) if path.suffix in suffixes]


def texts():
    """Every text file of the repository."""
    top = [path.name for path in ROOT.iterdir() if path.suffix in TEXT or path.name == "Makefile"]
    return [*files(*FOLDERS, suffixes=TEXT), *sorted(top), ".ci/run"]


# An op is a folder with an op.py, or with an op/ if that is split.
OPS = sorted({path.parent.name for name in ("op", "op.py") for path in ROOT.glob(f"inr_kernels/*/{name}")})
LIBRARY = files("inr_kernels", "models", suffixes={".py"})


def module_name(file):
    """inr_kernels/_core/checks.py -> inr_kernels._core.checks; models/ is installed as inr_kernels.models."""
    parts = Path(file).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "inr_kernels" else ("inr_kernels", *parts))
