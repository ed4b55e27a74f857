"""bench/compare.py on a small repository: two revisions of a package called inr_kernels, without native code."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETUP = """
import os, pathlib, time
from setuptools import setup
if "SLOW_BUILD" in os.environ:
    pathlib.Path(os.environ["SLOW_BUILD"]).touch()
    time.sleep(600)
setup(name="inr-kernels", packages=["inr_kernels"])
"""
OLD = "def double(x):\n    return x + x\n"
NEW = OLD + "def triple(x):\n    return 3 * x\ndef crash():\n    pass\n"
BENCHMARKS = """
import os
import pytest
import torch
import inr_kernels

@pytest.mark.parametrize("implementation", ["eager", "ours", "ours bf16"])
def bench_double(measure, implementation):
    dtype = torch.bfloat16 if "bf16" in implementation else torch.float32
    x = torch.ones(9, dtype=dtype)
    measure(lambda: inr_kernels.double(x), op="fake", case="double", implementation=implementation, dtype=dtype)

def bench_crash(measure):
    run = getattr(inr_kernels, "crash", os.abort)
    measure(run, op="fake", case="crash", implementation="ours", dtype=torch.float32)

def bench_triple(measure):
    x = torch.ones(9)
    measure(lambda: inr_kernels.triple(x), op="fake", case="triple", implementation="ours", dtype=x.dtype)
"""
IMPORTS = """
import torch
from inr_kernels import triple

def bench_imported(measure):
    measure(lambda: triple(2), op="fake", case="imported", implementation="ours", dtype=torch.float32)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository whose first commit lacks `triple`, with the benchmark machinery of this tree."""
    tree = tmp_path_factory.mktemp("repository")
    (tree / "inr_kernels" / "_core").mkdir(parents=True)
    (tree / "bench").mkdir()

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tree, check=True, capture_output=True)

    (tree / "setup.py").write_text(SETUP)
    (tree / "inr_kernels" / "__init__.py").write_text(OLD)
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text().partition("[project]")[0])
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "old")
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "inr_kernels" / "__init__.py").write_text(NEW)
    (tree / "inr_kernels" / "_core" / "native.py").write_text("def load():\n    return None, ''\n")
    for path in ROOT.glob("bench/*.py"):
        if not path.name.startswith("bench_"):
            shutil.copy(path, tree / "bench")
    (tree / "bench" / "bench_fake.py").write_text(BENCHMARKS)
    (tree / "bench" / "bench_imports.py").write_text(IMPORTS)
    return tree


def start(tree, *arguments, **environment):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, "-m", "bench.compare", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def heed_interrupts():  # tests that run in the background of a script ignore SIGINT, and so would the process
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = {"start_new_session": True, "preexec_fn": heed_interrupts}
    return subprocess.Popen(command, cwd=tree, env=environment, **options, **pipes)


def worktrees(tree):
    listed = subprocess.run(["git", "worktree", "list"], cwd=tree, text=True, check=True, capture_output=True)
    return len(listed.stdout.splitlines())


def test_both_revisions_are_in_the_table(repository):
    done = start(repository, "HEAD", "--tiny")
    out, progress = done.communicate(timeout=300)
    assert done.returncode == 0, out + progress
    heading, _, header, *lines = out.splitlines()
    assert "old: " in heading and "-dirty" in heading
    assert header.split() == ["case", "dtype", "old", "ms", "new", "ms", "old/new"]
    measured, failed = {}, {}
    for line in lines:
        if " failed: " in line:
            case, _, reason = line.partition(" failed: ")
            failed[case] = reason
        elif line:
            *case, dtype, old, new = line.split()[:5] if "failed" in line else line.split()[:-1]
            measured[" ".join(case), dtype] = old, new
    assert measured.keys() == {
        ("fake: double", "float32"),
        ("fake: double", "bfloat16"),
        ("fake: crash", "float32"),
        ("fake: triple", "float32"),
        ("fake: imported", "float32"),
    }
    assert [old for old, _ in measured.values()].count("failed") == 3
    assert all(float(new) >= 0 for _, new in measured.values())
    assert failed == {
        "fake: crash: old": f"the process ended with status {-signal.SIGABRT}",
        "fake: triple: old": "AttributeError: module 'inr_kernels' has no attribute 'triple'",
        "fake: imported: old": failed["fake: imported: old"],
    }
    assert failed["fake: imported: old"].startswith("ImportError: cannot import name 'triple'")
    assert "building" in progress and "[5/5]" in progress
    assert worktrees(repository) == 1

    again = start(repository, "HEAD", "--tiny", "-k", "double and bf16")
    out, progress = again.communicate(timeout=300)
    assert again.returncode == 0, out + progress
    assert "building" not in progress and "[1/1]" in progress

    empty = start(repository, "HEAD", "-k", "nothing_like_this")
    _, errors = empty.communicate(timeout=300)
    assert empty.returncode == 1
    assert 'no benchmark of "ours" is selected' in errors


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_an_interrupted_build_leaves_no_worktree(repository, tmp_path, stop):
    shutil.rmtree(repository / "build", ignore_errors=True)  # an installed revision is not built again
    marker, temporary = tmp_path / "building", tmp_path / "temporary"
    temporary.mkdir()
    running = start(repository, "HEAD", SLOW_BUILD=str(marker), TMPDIR=str(temporary))
    for _ in range(1200):
        if marker.exists():
            break
        time.sleep(0.1)
    assert worktrees(repository) == 2
    os.killpg(running.pid, stop)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + stop, errors
    assert worktrees(repository) == 1
    assert not list((repository / "build" / "base").iterdir())


def test_an_unknown_revision_is_named(repository):
    done = start(repository, "no-such-revision")
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 1
    assert "no-such-revision" in errors
