"""Fixtures and hooks of all tests: the Triton interpreter, poisoned memory, golden vectors, seeds, parallel runs."""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from passed import if_changed  # noqa: F401

CORES = os.cpu_count()
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, CORES // int(workers)))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # for the processes that tests start

# torch.compile starts no processes to compile in: each would import torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before inr_kernels is imported: Triton reads it when it decorates a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")

DURATIONS = Counter()  # seconds, by test

# Files whose locks say which tests may run now; any file serves.
QUEUE, RUNNING = Path(__file__), Path(__file__).parents[1] / "pyproject.toml"


SLOW = Path(__file__).with_name("slow_tests.txt")


def pytest_addoption(parser):
    parser.addoption("--record-slow", action="store_true", help=f"write tests above 1 s to {SLOW.name}, for make quick")
    text = "compile all Triton kernels again and write tests/build/compiled_kernels.jsonl"
    parser.addoption("--record-compiled", action="store_true", help=text)
    text = "run only the slow tests whose files have changed, and write tests/build/passed.jsonl"
    parser.addoption("--record-passed", action="store_true", help=text)
    text = "in test_launches.py, compile every kernel of the GPU tests as a whole, for all chips: an hour"
    parser.addoption("--whole-launches", action="store_true", help=text)


def pytest_runtest_logreport(report):
    DURATIONS[report.nodeid] += report.duration


def pytest_sessionfinish(session, exitstatus):
    """With --record-slow, writes the list of slow tests, once the workers have finished, unless they were stopped."""
    if (
        exitstatus <= pytest.ExitCode.TESTS_FAILED
        and session.config.option.record_slow
        and not hasattr(session.config, "workerinput")
    ):
        SLOW.write_text("".join(f"{name}\n" for name, seconds in DURATIONS.most_common() if seconds > 1))


def pytest_collection_modifyitems(config, items):
    """Skips tests that need a GPU where there is none; marks tests that fork, and slow ones; orders them."""
    if config.getoption("record_passed"):
        items[:] = [item for item in items if "if_changed" in item.fixturenames]
    slow = SLOW.read_text().splitlines()  # the slowest first
    names, order = set(slow), {name.partition("::")[0]: i for i, name in reversed([*enumerate(slow)])}
    for item in items:
        if item.nodeid in names:
            item.add_marker("slow")
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch.cuda sees no GPU"))
        if "in_a_fork" in item.fixturenames:
            item.add_marker("alone")
    # Tests that run alone first, beside quick ones; then the files of the slowest tests, so that no worker waits for
    # one at the end.
    unmarked = lambda item: [item.get_closest_marker(name) is None for name in ("alone", "slow")]  # noqa: E731
    items.sort(key=lambda item: (unmarked(item), order.get(item.nodeid.partition("::")[0], len(slow))))


@contextlib.contextmanager
def locked(path, kind=fcntl.LOCK_EX):
    """Holds a lock on the file, against the other workers of pytest-xdist."""
    with open(path, "a") as file:
        fcntl.flock(file, kind)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing does not release what a forked process still holds


@contextlib.contextmanager
def all_cores():
    """torch, and the processes that the block starts, use every core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(CORES))
        threads = torch.get_num_threads()
        torch.set_num_threads(CORES)
        yield
        torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Under pytest-xdist, runs a test marked `alone` while the other workers wait."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    alone = item.get_closest_marker("alone")
    with contextlib.ExitStack() as stack:
        with locked(QUEUE):  # first come, first served: the others' next tests wait behind a test that waits here
            stack.enter_context(locked(RUNNING, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        if alone:
            stack.enter_context(all_cores())
        return (yield)


@pytest.fixture(scope="session")
def built_once(request, tmp_path_factory):
    """built_once(name, build) -> a folder that build(folder) has filled, once for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if hasattr(request.config, "workerinput") else root

    def get(name, build):
        folder = root / name
        with locked(root / f"{name}.lock"):
            if not folder.exists():
                folder.mkdir()
                try:
                    build(folder)
                except BaseException:
                    shutil.rmtree(folder)
                    raise
        return folder

    return get


@pytest.fixture(scope="session")
def oldest_triton():
    """The folder of the oldest supported Triton, installed once into build/."""
    from compile_triton import OLDEST

    build = Path(__file__).parents[1] / "build"
    folder = build / f"triton-{OLDEST}-{sys.implementation.cache_tag}"
    build.mkdir(exist_ok=True)
    with locked(f"{folder}.lock"):
        if not folder.exists():
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", partial]
            subprocess.run([*pip, f"triton=={OLDEST}"], check=True)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def poison():
    """Makes output elements that a kernel does not write visible."""
    from inr_kernels._core.proof.poison import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture(scope="session", autouse=True)
def no_verdicts(tmp_path_factory):
    """Keeps the user's verdicts of `inr-kernels prove` out of the tests, and theirs out of the user's file."""
    from inr_kernels._core import verdicts

    path = tmp_path_factory.mktemp("cache") / "verdicts.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "file", lambda: path)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_map_is_small():
    """LaMa's layers use the kernels on the tests' maps too, which are so small that they would call torch's layers."""
    from inr_kernels.fourier_unit.module import fused

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "MIN_POSITIONS", 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Makes the interpreter faster.

    Triton's language is patched once a launch and module, not in each call of a function. Sums of 32-bit integers are
    not computed a second time in 64 bits, to detect an overflow: the tensors of the tests are too small for one.
    """
    if HAS_GPU:
        yield
        return
    from triton.runtime import interpreter

    builder, patch_lang, scopes = interpreter.interpreter_builder, interpreter._patch_lang, {}

    def restore():
        while scopes:
            scopes.popitem()[1].restore()

    def patch_once(fn):
        if fn.__module__ not in scopes:
            scopes[fn.__module__] = patch_lang(fn)
        return SimpleNamespace(restore=restore)  # which the launch calls at its end

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture(autouse=True)
def seed():
    """Seeds torch, so that a test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """golden("liif_x3") -> the arrays of tests/golden/liif_x3.npz as tensors, by name."""

    def load(name):
        with numpy.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays}

    return load


@pytest.fixture(scope="session")
def run_python():
    """run_python(code, **environment) -> what the code prints in a new interpreter that finds tests/support."""
    support = str(Path(__file__).parent / "support")
    found = {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), support]))}

    def run(code, **environment):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | found | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def expected_isa(run_python):
    """expected_isa("avx2") -> the instruction set that INR_KERNELS_ISA=avx2 selects here: generic if unsupported."""
    widths = ["generic", "avx2", "avx512", "avx512bf16", "amx"]
    widest = run_python("from inr_kernels import _C; print(_C.isa())", INR_KERNELS_ISA="").strip()
    return lambda isa: isa if widths.index(isa) <= widths.index(widest) else "generic"


@pytest.fixture
def fast_half(monkeypatch):
    """As on a processor with instructions for half precision, for which torch has fast layers."""
    from inr_kernels._core import backends

    monkeypatch.setattr(backends, "FLOAT_DTYPES", (torch.float32, torch.float64))


@pytest.fixture
def slow_half(monkeypatch):
    """As on a processor without instructions for half precision."""
    from inr_kernels._core import backends

    monkeypatch.setattr(backends, "FLOAT_DTYPES", (torch.float32, torch.float64, torch.bfloat16, torch.float16))


@pytest.fixture
def in_a_fork():
    """in_a_fork(compute): whether a forked child computes the same; the child is killed after a minute.

    threads: of torch in the child, which does not have its parent's threads: torch's own loops would wait for them.
    """

    def check(compute, threads=None):
        expected = compute()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of a fork in a process with threads
            child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                if threads:
                    torch.set_num_threads(threads)
                out = compute()
                torch.set_num_threads(1)
                os._exit(0 if torch.equal(out, expected) else 1)
            finally:
                os._exit(2)
        return os.waitpid(child, 0)[1] == 0

    return check
