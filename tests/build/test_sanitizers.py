"""The C++ under ASan and UBSan: the numeric tests once more, through a build that stops at the first finding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Of each op, the tests that reach every loop and border of its C++: pytest's -k, within the op's files.
CHOSEN = {
    "local_implicit": "shapes_and_scales or layouts or wanted or foreign_memory or not_finite or gradcheck or heap",
    "elementwise_filter": "test_shapes or gradcheck or wanted or foreign_memory or extreme or nan_stays or empty",
    "fourier_unit": "winograd or halves_of or test_shapes",
    "unmask_attention": "test_shapes or gradcheck or foreign_memory or large_scores or nan_and or empty or strides",
}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The package, installed with sanitizers into a folder; yields the folder and the environment that runs it."""
    folder = tmp_path_factory.mktemp("sanitized")
    environment = os.environ | {"INR_KERNELS_SANITIZE": "address,undefined", "INR_KERNELS_CUDA": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", folder]
    subprocess.run([*install, ROOT], env=environment, check=True)
    libraries = [
        subprocess.run(["g++", f"-print-file-name={lib}"], capture_output=True, text=True, check=True).stdout.strip()
        for lib in ("libasan.so", "libubsan.so")
    ]
    preload = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(folder)}
    return folder, environment | preload


@pytest.mark.parametrize("isa", ["generic", "avx512"])
def test_cpp_under_address_and_undefined_behaviour_sanitizers(isa, sanitized):
    folder, environment = sanitized
    chosen = " or ".join(f"({op} and ({tests}))" for op, tests in CHOSEN.items())
    files = [ROOT / "tests/ops" / f"test_{op}{suffix}.py" for op in CHOSEN for suffix in ("", "_contract")]
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "pythonpath="]
    done = subprocess.run(
        [*run, "-k", f"({chosen}) and not triton", *files],
        cwd=folder,
        env=environment | {"INR_KERNELS_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
