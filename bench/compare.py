"""`python -m bench.compare REV [pytest arguments]` compares the kernels of a git revision with those of this tree.

It builds REV in a temporary worktree and installs it into build/base/, where the next comparison finds it. Then today's
benchmarks of "ours" run in two processes, one per revision, whose rounds alternate; the table shows the medians. A
benchmark that REV cannot run, because it lacks a name or an argument, is listed with the reason.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .compare_worker import ROOT, Case, Failure
from .conftest import commit, machine
from .report import aligned

INSTALLED = ROOT / "build" / "base"


def git(*arguments: str) -> str:
    """Returns the output of git in this repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Checks out a revision into a temporary worktree, which is removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        try:
            git("worktree", "add", "--quiet", "--detach", str(tree), revision)
            yield tree
        finally:
            remove = ["git", "worktree", "remove", "--force", "--force", tree]  # twice: also while `add` has locked it
            subprocess.run(remove, cwd=ROOT, capture_output=True, check=False)


def install(revision: str) -> Path:
    """Builds and installs a revision, without its dependencies, into a folder of its own; returns the folder."""
    target = INSTALLED / f"{revision[:12]}-{sys.implementation.cache_tag}"
    if target.exists():
        return target
    environment = {"INR_KERNELS_CUDA": "0"}  # without a GPU, no CUDA: nvcc takes many minutes
    if torch.cuda.is_available():
        environment = {"CUDAARCHS": "{}{}-real".format(*torch.cuda.get_device_capability())}
    environment |= os.environ
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    INSTALLED.mkdir(parents=True, exist_ok=True)
    print(f"building {revision[:12]}, which takes some minutes", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=INSTALLED) as partial, worktree(revision) as tree:
        if subprocess.run([*command, Path(partial, "package"), tree], env=environment, check=False).returncode:
            sys.exit(f"{revision} could not be built")
        os.replace(Path(partial, "package"), target)
    return target


class Process:
    """A worker process that imports one revision of inr_kernels.

    Args:
        folder: where the revision is installed; None: the revision of this environment.
        arguments: for pytest.
    """

    def __init__(self, folder: Path | None, arguments: list[str]):
        self.folder, self.arguments = folder, arguments
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (see close)
        self.start()

    def start(self) -> None:
        """Starts the process and collects the benchmarks."""
        self.pipe, remote = multiprocessing.Pipe()
        command, environment = [sys.executable, "-m", "bench.compare_worker"], dict(os.environ)
        if self.folder:
            # -S: no .pth file and with it no editable install, which would find this tree's modules.
            command.insert(1, "-S")
            environment["PYTHONPATH"] = os.pathsep.join(map(str, [self.folder, ROOT, *filter(None, sys.path)]))
        self.process = subprocess.Popen(
            [*command, str(remote.fileno()), *self.arguments],
            cwd=self.folder or ROOT,
            env=environment,
            pass_fds=[remote.fileno()],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        remote.close()
        self.collected = self.receive()
        if isinstance(self.collected, Failure):
            self.log.seek(0)
            sys.exit(f"{self.log.read()}\n{self.collected.reason}")
        if self.folder and not Path(self.collected.package).is_relative_to(self.folder):
            sys.exit(f"{self.collected.package} was imported instead of the package in {self.folder}")

    def begin(self, node: str) -> Case | Failure:
        """Prepares a benchmark, in a new process if the last one ended."""
        if self.process.poll() is not None:
            self.start()
        if node in self.collected.nodes:
            return self.ask(node) or Failure("it measures nothing")
        return Failure(self.collected.errors.get(node.split("::")[0], "it is not collected"))

    def receive(self):
        """Returns the next message of the process, or a Failure if it ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return Failure(f"the process ended with status {self.process.wait()}")

    def ask(self, message):
        """Sends a message and returns the answer, or a Failure if the process ended."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)
        return self.receive()

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.wait()
        self.pipe.close()
        self.log.close()


class Row(NamedTuple):
    """A line of the table; of either revision the median seconds, or why it failed."""

    case: str
    dtype: str
    old: float | Failure
    new: float | Failure

    def cells(self) -> list[str]:
        """Returns the line's text, without the reasons of failures."""
        numbers = [f"{value * 1e3:.3f}" if isinstance(value, float) else "failed" for value in (self.old, self.new)]
        both = isinstance(self.old, float) and isinstance(self.new, float)
        return [self.case, self.dtype, *numbers, f"{self.old / self.new:.2f}" if both else ""]


def compare(node: str, processes: list[Process]) -> Row:
    """Measures a benchmark in both processes, whose rounds alternate."""
    results, seconds = [process.begin(node) for process in processes], [[] for _ in processes]
    case = next((result for result in results if isinstance(result, Case)), Case(node, "", 0))
    for _ in range(case.rounds):
        for i, process in enumerate(processes):
            if not isinstance(results[i], Failure):
                results[i] = process.ask(True)
                seconds[i].append(results[i])
    for i, process in enumerate(processes):
        if not isinstance(results[i], Failure):
            results[i] = process.ask(False) or statistics.median(seconds[i])
    return Row(case.name, case.dtype, *results)


def table(rows: list[Row]) -> str:
    """Returns the table, followed by the reasons of failures."""
    lines = [aligned([["case", "dtype", "old ms", "new ms", "old/new"], *(row.cells() for row in rows)]), ""]
    for row in rows:
        for name, value in (("old", row.old), ("new", row.new)):
            if isinstance(value, Failure):
                lines.append(f"{row.case}: {name} failed: {value.reason}")
    return "\n".join(lines).rstrip()


def main() -> None:
    """Builds the old revision, measures both and prints the table; the status is 1 if the new one failed anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", metavar="REV", help="the git revision to compare with")
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help='arguments of pytest, as -k "local_implicit and bf16"')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that everything is cleaned up
    base = git("rev-parse", "--verify", f"{args.base}^{{commit}}")
    folder, rows = install(base), []
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(contextlib.closing(Process(folder, args.pytest)))
        new = stack.enter_context(contextlib.closing(Process(None, args.pytest)))
        nodes = new.collected.nodes
        for i, node in enumerate(nodes, 1):
            print(f"[{i}/{len(nodes)}] {node}", file=sys.stderr, flush=True)
            rows.append(compare(node, [old, new]))
    if not rows:
        sys.exit('no benchmark of "ours" is selected')
    about = machine()
    print(
        f"old: {base[:12]}, new: {commit()}; {about['name']}, torch {about['torch']}; medians of alternating rounds\n"
    )
    print(table(rows))
    sys.exit(any(isinstance(row.new, Failure) for row in rows))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
