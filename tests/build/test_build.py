"""The build from nothing: a wheel without torch, CUDA where nvcc is, C++ alone where it is not."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from inr_kernels._core import native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources."""
    target = tmp_path / "tree"
    skip = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "__pycache__", "*.egg-info", "golden")
    shutil.copytree(ROOT, target, ignore=skip)
    return target


def build(tree, path=None, **environment):
    """`pip wheel` in the tree, in this environment; without `path`'s nvcc where one is given."""
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | environment | {"PATH": path or f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tree / "dist", tree]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def cuda_archs(tree):
    """`_C.cuda_archs` of the tree's wheel, imported where there is no torch."""
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if "/_C." in name and name.endswith(".so"))
        archive.extract(member, tree / "out")
        assert "inr_kernels/models/liif_small.safetensors" in archive.namelist()
    code = "import sys, _C; assert 'torch' not in sys.modules and not _C.has_openmp(); print(_C.cuda_archs)"
    where = {"PYTHONPATH": str((tree / "out" / member).parent)}
    run = [sys.executable, "-S", "-c", code]
    return subprocess.run(run, env=where, capture_output=True, text=True, check=True).stdout.strip()


def without_nvcc(tmp_path):
    """A PATH that has everything but nvcc."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep)]:
        for tool in Path(folder).glob("*") if Path(folder).is_dir() else []:
            link = tools / tool.name
            if tool.name != "nvcc" and not link.exists():
                link.symlink_to(tool)
    return str(tools)


def test_cuda_is_built_where_nvcc_is(tree):
    done = build(tree, CUDAARCHS="89")  # one of five: nvcc takes most of the time
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert cuda_archs(tree) == ("89" if shutil.which("nvcc") else "")


def test_the_installed_build_is_for_every_chip():
    assert native.load()[0].cuda_archs == ("80,86,89,90,120" if shutil.which("nvcc") else "")


def test_cpp_alone_without_nvcc(tree, tmp_path):
    path = without_nvcc(tmp_path)
    done = build(tree, path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert cuda_archs(tree) == ""
    forced = build(tree, path, INR_KERNELS_CUDA="1")
    assert forced.returncode != 0
    assert "INR_KERNELS_CUDA=1 requires CUDA, but there is no nvcc on PATH" in forced.stdout + forced.stderr
