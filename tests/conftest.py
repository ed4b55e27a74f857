"""What every test stands on: Triton interpreted without a GPU, poison, golden vectors, a seed."""

import functools
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before inr_kernels is imported: Triton reads it when it decorates a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Skip, with the reason, what only a GPU can prove."""
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch.cuda sees no GPU"))


def poisoned(make):
    """`make`, with fresh memory full of what no sum survives: NaN, or the largest integer."""

    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        out = make(*args, **kwargs)
        # Only real memory: the subclasses (fake, functional) and what Dynamo traces have none.
        if torch.compiler.is_compiling() or type(out) is not torch.Tensor or out.is_meta:
            return out
        if out.dtype == torch.bool:
            return out
        exact = not (out.is_floating_point() or out.is_complex())
        with torch.no_grad():
            return out.fill_(torch.iinfo(out.dtype).max if exact else float("nan"))

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def poison():
    """An output that a kernel leaves unwritten shows."""
    from inr_kernels._core import native

    makers = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (native, "empty_like")]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in makers:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """golden("liif_x3") -> the arrays of tests/golden/liif_x3.npz as tensors, by name."""

    def load(name):
        with numpy.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays}

    return load


@pytest.fixture
def run_python():
    """run_python(code, **environment) -> what the code prints in an interpreter of its own."""

    def run(code, **environment):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def expected_isa(run_python):
    """expected_isa("avx2") -> the instruction set that INR_KERNELS_ISA=avx2 gives here: generic where it is missing."""
    widths = ["generic", "avx2", "avx512", "avx512bf16"]
    widest = run_python("from inr_kernels import _C; print(_C.isa())", INR_KERNELS_ISA="").strip()
    return lambda isa: isa if widths.index(isa) <= widths.index(widest) else "generic"


@pytest.fixture
def in_a_fork():
    """in_a_fork(compute): whether a forked child computes the same; one that hangs is killed after a minute.

    threads: of torch in the child, which lacks its parent's: torch's own loops wait for them for ever.
    """

    def check(compute, threads=None):
        expected = compute()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of any fork beside threads
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
