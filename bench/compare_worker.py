"""The worker process of `bench.compare`: runs today's benchmarks on the revision of inr_kernels that it imports.

It is a pytest session that collects the benchmarks of "ours", then runs those that the parent process names, and
measures one round whenever the parent asks for it, so that the rounds of two workers can alternate.
"""

import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import inr_kernels  # before pytest extends sys.path: this revision and no other

from . import timing

ROOT = Path(__file__).resolve().parents[1]


class Collected(NamedTuple):
    """The first message: the path of the package, the node ids of the benchmarks, {file: why it cannot be imported}."""

    package: str
    nodes: list[str]
    errors: dict[str, str]


class Case(NamedTuple):
    """A benchmark that is ready to be measured, after a first call."""

    name: str
    dtype: str
    rounds: int


class Failure(NamedTuple):
    """Why a benchmark failed."""

    reason: str


class Worker:
    """A pytest plugin. Messages of the parent: a node id to run (None ends the session), then True for each round and
    False to finish. Answers: a Case, the seconds of each round, None at the end; or a Failure.
    """

    def __init__(self, pipe: Connection):
        self.pipe, self.errors, self.failure = pipe, {}, None

    @pytest.fixture
    def benchmark(self):
        """Replaces the fixture of pytest-benchmark."""
        return self

    def pytest_exception_interact(self, node, call, report):
        error = call.excinfo.value
        if isinstance(error, pytest.Collector.CollectError):
            error = error.__cause__ or error
        failure = Failure(f"{type(error).__name__}: {error}".split("\n")[0])
        if isinstance(node, pytest.Item):
            self.failure = failure
        else:
            self.errors[node.nodeid] = failure.reason

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self._is_ours(item)]

    def _is_ours(self, item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("implementation", "ours").startswith("ours")

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        self.pipe.send(Collected(inr_kernels.__file__, list(items), self.errors))
        while (node := self.pipe.recv()) is not None:
            self.failure = None
            torch.manual_seed(0)  # the same weights and inputs in both workers
            session.config.hook.pytest_runtest_protocol(item=items[node], nextitem=None)
            self.pipe.send(self.failure)
        return True

    def measure(self, run, *, op, case, implementation, dtype, rounds=7, **_):
        """The fixture `measure` of conftest.py."""
        run()  # compiles, allocates, fills caches
        rounds = 3 * rounds if timing.median(run) < timing.CPU_BUDGET else max(rounds, 3)
        form = implementation.removesuffix(" bf16").removeprefix("ours").strip()
        name = f"{op}: {case}" + (f", {form}" if form else "")
        self.pipe.send(Case(name, str(dtype).removeprefix("torch."), rounds))
        while self.pipe.recv():
            self.pipe.send(timing.median(run))


def main():
    """Runs the pytest session: `compare_worker FD [pytest arguments]`, with the pipe's file descriptor."""
    descriptor, *arguments = sys.argv[1:]
    options = ["-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default", f"--rootdir={ROOT}"]
    worker = Worker(Connection(int(descriptor)))
    sys.exit(pytest.main([*options, "-c", ROOT / "pyproject.toml", ROOT / "bench", *arguments], plugins=[worker]))


if __name__ == "__main__":
    # Under this name, not __main__: conftest.py imports `Worker` from it.
    from bench import compare_worker

    compare_worker.main()
