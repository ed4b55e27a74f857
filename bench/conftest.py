"""Fixtures: each benchmark calls `measure(...)` once, which adds a row to bench/results/<machine>.json."""

import contextlib
import ctypes
import functools
import gc
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import inr_kernels

from . import timing
from .compare_worker import Worker

RESULTS = Path(__file__).parent / "results"
DEVICE = timing.DEVICE


def pytest_addoption(parser):
    parser.addoption("--tiny", action="store_true", help="use tiny shapes, to try the benchmarks")
    parser.addoption(
        "--add", action="store_true", help="keep other implementations of the same cases from earlier runs"
    )
    parser.addoption("--results", type=Path, default=RESULTS, help="folder of the results")


def random_leaf(*shape):
    """Returns random numbers that require gradients."""
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


@functools.cache
def machine():
    """Returns the hardware and the versions that the numbers depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    if DEVICE == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        return {"name": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda, **versions}
    from inr_kernels._core import native

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model, family = (re.search(rf"^{key}\s*: (.*)", text, re.MULTILINE) for key in ("model name", "cpu family"))
    library = native.load()[0]
    # Virtual machines give several generations of a processor one name; the family tells them apart.
    name = f"{model[1]} (family {family[1]})" if model and family else platform.processor()
    name = f"{name}, {os.cpu_count()} cores"
    return {"name": name, "instruction set": library.isa() if library else "not built", **versions}


@functools.cache
def commit():
    """Returns the measured commit, with -dirty if the tree has changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "an unknown commit"


class Run:
    """The rows of one session, and the machine's measured peak rates (ceilings) that they are compared with."""

    def __init__(self, folder, tiny=False, add=False):
        self.folder, self.tiny, self.add_to_cases = folder, tiny, add
        self.rows, self._peaks, self._copy = [], {}, None

    def peak(self, dtype):
        """Returns the FLOP/s that this machine can reach in the dtype."""
        from inr_kernels.cli import ceilings

        name = str(dtype).removeprefix("torch.")
        if name not in self._peaks:
            self._peaks[name] = ceilings.peak_flops(DEVICE, dtype, 128 if self.tiny else None)
        return self._peaks[name]

    def copy(self):
        """Returns the bytes/s of a large copy."""
        from inr_kernels.cli import ceilings

        if self._copy is None:
            self._copy = ceilings.copy_bytes(DEVICE, 1 << 20 if self.tiny else None)
        return self._copy

    def add(self, row):
        """Adds a row and saves all."""
        self.rows.append(row)
        self._save()

    def _save(self):
        """Replaces the rows of the same cases in this machine's file, atomically."""
        about = machine()
        # Processors of one name may differ in their instruction sets.
        slug = re.sub(r"[^a-z0-9]+", "-", f"{about['name']} {about['instruction set']}".lower()).strip("-")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{slug}.json"
        stamp = {"commit": commit(), "command": "pytest " + " ".join(sys.argv[1:]), "date": time.strftime("%Y-%m-%d")}
        stamp |= {"peak_flops": self._peaks, "copy_bytes": self._copy}
        run = f"{stamp['commit']} {stamp['command']}"
        key = ("op", "case", "implementation") if self.add_to_cases else ("op", "case")
        fresh = {tuple(row[name] for name in key) for row in self.rows}
        old = json.loads(path.read_text()) if path.exists() else {"runs": {}, "rows": []}
        rows = [row for row in old["rows"] if tuple(row[name] for name in key) not in fresh]
        rows += [row | {"run": run} for row in self.rows]
        kept = dict.fromkeys(row["run"] for row in rows if row["run"] != run)
        runs = {name: old["runs"][name] for name in kept} | {run: stamp}
        text = json.dumps({"machine": about, "runs": runs, "rows": rows}, indent=1)
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n")
        os.replace(partial, path)


def peak_bytes(run):
    """Returns the peak memory of `run()` beyond what was allocated before."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    inr_kernels.release_memory()
    with contextlib.suppress(AttributeError):  # glibc: return freed pages, or the next call reuses them unnoticed
        ctypes.CDLL(None).malloc_trim(0)
    page, status = os.sysconf("SC_PAGESIZE"), Path("/proc/self/statm")
    done, samples = threading.Event(), []

    def watch():
        while not done.wait(0.001):
            samples.append(int(status.read_text().split()[1]) * page)

    before = int(status.read_text().split()[1]) * page
    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max([before, *samples]) - before


@pytest.fixture(scope="session")
def session_run(request):
    return Run(*map(request.config.getoption, ("results", "tiny", "add")))


@pytest.fixture
def smoke(request):
    """Whether the run only checks that the benchmarks work, with tiny shapes."""
    return request.config.getoption("benchmark_disable", False) or request.config.getoption("tiny")


@pytest.fixture(autouse=True)
def without_compiling(smoke):
    """Where nothing is timed, torch.compile's functions run uncompiled."""
    with torch.compiler.set_stance("force_eager") if smoke else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def triton_on_a_gpu():
    """Requests the Triton backend on a GPU, where the reference is the default."""
    with inr_kernels.backend("triton") if DEVICE == "cuda" else contextlib.nullcontext():
        yield


@pytest.fixture
def measure(benchmark, session_run, request):
    """Returns measure(run, op=, case=, implementation=, dtype=, ...), which times `run()` and adds a row.

    flops: the minimum FLOPs, or a function that returns them; compared with the peak rate of the dtype in this run.
    bytes: the minimum bytes to read and write; compared with a large copy in this run.
    rounds: how often a CPU is timed.
    small: whether a GPU is also timed with a cold L2 cache, and with the call as a CUDA graph.

    Every row is saved at once: a later benchmark may fail or be interrupted. Under `bench.compare` its worker measures.
    """
    if isinstance(benchmark, Worker):
        return benchmark.measure

    def measure(run, *, op, case, implementation, dtype, flops=None, bytes=None, rounds=7, small=False, **notes):
        flops = flops() if callable(flops) else flops
        if request.config.getoption("benchmark_disable"):
            benchmark.pedantic(run, rounds=1)
            return

        def synchronized():
            run()
            timing.synchronize()

        row = {"op": op, "case": case, "implementation": implementation}
        row["dtype"] = str(dtype).removeprefix("torch.")
        try:
            synchronized()
            benchmark.pedantic(synchronized, rounds=1 if DEVICE == "cuda" else rounds, warmup_rounds=1)
            if DEVICE == "cuda":
                row |= timing.figures(run, small)
            else:
                stats = benchmark.stats.stats
                row |= {"seconds": stats.median, "spread": stats.iqr, "rounds": rounds}
        except torch.OutOfMemoryError:
            session_run.add(row | {"seconds": None} | notes)
            pytest.fail("out of memory; the report shows it")
        except Exception as error:
            session_run.add(row | {"seconds": None, "error": f"{type(error).__name__}: {error}"[:300]} | notes)
            raise
        if flops is not None:
            row |= {"flops": flops, "of_peak": flops / row["seconds"] / session_run.peak(dtype)}
        if bytes is not None:
            row |= {"bytes": bytes, "of_copy": bytes / row["seconds"] / session_run.copy()}
        row |= {"peak_bytes": peak_bytes(run), **notes}
        benchmark.extra_info.update(row)
        session_run.add(row)

    return measure
