"""Benchmarks: `pytest bench --benchmark-only` measures, `python -m bench.report` writes the tables and plots."""

import functools
import importlib
from pathlib import Path
from types import ModuleType


@functools.cache
def op_modules() -> dict[str, ModuleType]:
    """Returns {op: module `bench_<op>`} of the ops that have one, in alphabetical order."""
    from inr_kernels._core.dispatch import OPS

    names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    return {name: importlib.import_module(f"bench.bench_{name}") for name in names if name in OPS}
