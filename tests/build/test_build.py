"""What is built and installed from the sources: a wheel, an sdist, an editable install; with nvcc and without it."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from tree import LIBRARY, ROOT, files

from inr_kernels._core import native

pytestmark = pytest.mark.slow
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-build-isolation", "--no-deps"]
# The lowest instruction set alone, neither optimized nor with debug information: most of the time goes into what the
# installed build has.
OPTIONS = [
    *(f"-DINR_COMPILES_{isa}=OFF" for isa in ("avx2", "avx512", "avx512bf16", "amx")),
    "-DCMAKE_BUILD_TYPE=Debug",
]
OPTIONS += [f"-DCMAKE_{language}_FLAGS_DEBUG=" for language in ("CXX", "CUDA")]
QUICK = {"CUDAARCHS": "89", "CMAKE_ARGS": " ".join(OPTIONS)}


def run(command, folder, **environment):
    """Runs a command in the folder, with the scripts of this environment (ninja, cmake) on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path} | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def checked(command, folder, **environment):
    """`run`, where the command must succeed; returns what it prints."""
    done = run(command, folder, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def copy_sources(folder):
    """Copies the sources, without anything that was built, to folder/tree."""
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.so", "__pycache__", "*.egg-info", "golden")
    return shutil.copytree(ROOT, folder / "tree", ignore=skip)


def environment_with_torch(folder):
    """The Python of a new environment that sees the packages of this one, but for inr_kernels."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file does not run the .pth files there, through which an editable install is found.
    (packages / "seen.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder / "bin" / "python"


def without_nvcc(folder):
    """A PATH with every tool but nvcc."""
    tools = folder / "tools"
    tools.mkdir()
    for path in [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep)]:
        for tool in Path(path).glob("*") if Path(path).is_dir() else []:
            link = tools / tool.name
            if tool.name != "nvcc" and not link.exists():
                link.symlink_to(tool)
    return str(tools)


def quick_cuda():
    """The environment of a quick build: nvcc, where it can, does not optimize either."""
    known = shutil.which("nvcc") and "--Ofast-compile" in checked(["nvcc", "--help"], ROOT)
    return QUICK | ({"NVCC_APPEND_FLAGS": "--Ofast-compile=max"} if known else {})


@pytest.fixture(scope="session")
def sdist(built_once):
    """The folder of a source distribution, unpacked."""

    def build(folder):
        code = "import sys, setuptools.build_meta; setuptools.build_meta.build_sdist(sys.argv[1])"
        checked([sys.executable, "-c", code, folder], copy_sources(folder))
        (archive,) = folder.glob("*.tar.gz")
        checked(["tar", "-xf", archive], folder)

    (found,) = (path for path in built_once("sdist", build).glob("*-*") if path.is_dir())
    return found


@pytest.fixture(scope="session")
def wheel(built_once, sdist):
    """A wheel, built from nothing in the folder of the sdist; with CUDA for one GPU where nvcc is."""
    build = lambda folder: checked([*PIP, "wheel", *OFFLINE, "-w", folder, sdist], folder, **quick_cuda())  # noqa: E731
    (found,) = built_once("wheel", build).glob("*.whl")
    return found


NETWORK = """
import importlib.resources
import torch
import inr_kernels
from inr_kernels.models import IN2

package = importlib.resources.files("inr_kernels")
assert all(package.joinpath(name).is_file() for name in ("py.typed", "_C.pyi"))
image, mask = torch.rand(1, 3, 24, 32), torch.zeros(1, 1, 24, 32)
mask[..., 8:16, 8:16] = 1
out = IN2.pretrained().inpaint(image, mask)
assert out.shape == image.shape and out.isfinite().all()
assert torch.equal(out * (1 - mask), image * (1 - mask))
print(inr_kernels.__file__, inr_kernels._C.cuda_archs, sep="|")
"""


def run_a_network(python, folder):
    """Runs a pretrained network; returns where inr_kernels was found and what its CUDA kernels were compiled for."""
    file, archs = checked([python, "-c", NETWORK], folder).strip().split("|")
    return Path(file), archs


def test_wheel(wheel, tmp_path):
    python = environment_with_torch(tmp_path / "env")
    checked([*PIP, "--python", python, "install", "--ignore-installed", "--no-deps", wheel], tmp_path)
    file, archs = run_a_network(python, tmp_path)
    assert file.is_relative_to(tmp_path / "env")
    assert archs == ("89" if shutil.which("nvcc") else "")


def test_contents_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = files("inr_kernels", "models", suffixes={".pyi", ".typed", ".safetensors", ".yaml"})
    expected = {*LIBRARY, *data, "inr_kernels/py.typed"}
    expected = {name if name.startswith("inr_kernels/") else f"inr_kernels/{name}" for name in expected}
    others = {name for name in names - expected if ".dist-info/" not in name}
    assert not expected - names
    assert [Path(name).suffix for name in others] == [".so"]


def test_manylinux_wheel(wheel, tmp_path):
    """`make wheel` ends with this: every library that the wheel needs is one that manylinux systems have."""
    checked(["auditwheel", "repair", "--wheel-dir", tmp_path, wheel], tmp_path)
    (repaired,) = tmp_path.glob("*.whl")
    assert re.search(r"-manylinux_2_\d+_\w+[.]whl$", repaired.name)
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(repaired) as after:
        contents = [
            {name for name in file.namelist() if ".dist-info/" not in name and name[-1] != "/"}
            for file in (before, after)
        ]
    assert contents[0] == contents[1], "no library is copied into the wheel"


def test_native_library_needs_no_torch(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".so"))
        archive.extract(member, tmp_path)
    code = "import sys, _C; assert 'torch' not in sys.modules; print(_C.has_openmp())"
    found = {"PYTHONPATH": str((tmp_path / member).parent)}
    assert checked([sys.executable, "-S", "-c", code], tmp_path, **found).strip() == "False"


def test_installs_in_the_wheels_tree(wheel, sdist, tmp_path):
    """Where little is compiled again: an editable install; then without nvcc, with torch's copy of pybind11.

    bench/gpu_record.sh uses that copy on a machine without the package.
    """
    install = ["install", "--ignore-installed", *OFFLINE]
    python = environment_with_torch(tmp_path / "editable")
    checked([*PIP, "--python", python, *install, "-e", sdist], tmp_path, **quick_cuda())
    file, _ = run_a_network(python, tmp_path)
    assert file == sdist / "inr_kernels" / "__init__.py"
    (sdist / "models" / "added.py").write_text("X = 3\n")  # an edit of a file is an edit of the package
    assert checked([python, "-c", "from inr_kernels.models.added import X; print(X)"], tmp_path) == "3\n"

    headers = f" -DINR_PYBIND11_INCLUDE={Path(torch.__file__).parent / 'include'}"
    options = QUICK | {"CMAKE_ARGS": QUICK["CMAKE_ARGS"] + headers, "PATH": without_nvcc(tmp_path)}
    python = environment_with_torch(tmp_path / "without_nvcc")
    checked([*PIP, "--python", python, *install, sdist], tmp_path, **options)
    file, archs = run_a_network(python, tmp_path)
    assert file.is_relative_to(tmp_path / "without_nvcc")
    assert archs == ""


def test_cuda_cannot_be_forced_without_nvcc(tmp_path):
    tree, path = copy_sources(tmp_path), without_nvcc(tmp_path)
    forced = run([*PIP, "wheel", *OFFLINE, "-w", tmp_path, tree], tmp_path, PATH=path, INR_KERNELS_CUDA="1")
    assert forced.returncode != 0
    assert re.search("INR_KERNELS_CUDA=1 .* CUDA, but there is no nvcc on PATH", forced.stdout + forced.stderr)


NEEDED = "inr_kernels needs GCC 12 or later, or Clang 14 or later, for their vector extensions"


def test_compiler_without_vector_extensions(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("""#!/bin/sh\nexec g++ '-D__attribute__(x)=' "$@"\n""")
    compiler.chmod(0o755)
    done = run(["cmake", f"-S{ROOT}", "-Bbuild", "-GNinja", f"-DCMAKE_CXX_COMPILER={compiler}"], tmp_path)
    assert done.returncode != 0
    assert f"{NEEDED}; got GNU" in " ".join(done.stderr.split())


def test_header_without_vector_extensions(tmp_path):
    """The first error names the compiler that is needed, where the sources are built without CMake, too."""
    compile = ["g++", "-std=c++17", "-fsyntax-only", "-U__GNUC__", "-DINR_ISA=generic", ROOT / "csrc/cpu/common/gemm.h"]
    errors = [line for line in run(compile, tmp_path).stderr.splitlines() if "error:" in line]
    assert NEEDED in errors[0]


def test_the_installed_build_is_for_every_gpu():
    """Or for those that CUDAARCHS names; of CUDA's own version."""
    library, nvcc = native.load()[0], shutil.which("nvcc")
    if not nvcc:
        assert library.cuda_archs == library.cuda_version == ""
        return
    known = re.findall(r"sm_(\d+)$", checked([nvcc, "--list-gpu-code"], ROOT), re.MULTILINE)
    archs = [arch for arch in ("80", "86", "89", "90", "100", "120") if arch in known]
    named = os.environ.get("CUDAARCHS", ";".join(archs)).replace("-real", "").replace("-virtual", "")
    assert library.cuda_archs == named.replace(";", ",")
    assert f"release {library.cuda_version}," in checked([nvcc, "--version"], ROOT)
