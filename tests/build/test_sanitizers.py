"""The C++ under ASan and UBSan: the ops' numeric tests, with a build that stops at the first error.

They run again where files have changed, see `if_changed`: the build takes minutes.
"""

import os
import subprocess
import sys
from pathlib import Path

import native_tests
import pytest
from tree import ROOT

pytestmark = pytest.mark.slow
ISAS = ["generic", "avx512"]


@pytest.fixture(scope="session")
def sanitized(built_once):
    """sanitized() -> the package, installed with sanitizers into a folder; and the environment to run it in."""

    def build(folder):
        others = " ".join(f"-DINR_COMPILES_{isa}=OFF" for isa in ("avx2", "avx512bf16", "amx"))
        environment = {"INR_KERNELS_SANITIZE": "address,undefined", "INR_KERNELS_CUDA": "0", "CMAKE_ARGS": others}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target"]
        subprocess.run([*install, folder, ROOT], env=os.environ | environment, check=True)

    def get():
        folder = built_once("sanitized", build)
        libraries = [
            subprocess.run(
                ["g++", f"-print-file-name={lib}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for lib in ("libasan.so", "libubsan.so")
        ]
        preload = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(folder)}
        return folder, os.environ | preload

    return get


@pytest.mark.parametrize("isa", ISAS)
def test_cpp_under_address_and_undefined_behaviour_sanitizers(isa, sanitized, if_changed, expected_isa, request):
    def run(ops):
        if expected_isa(isa) != isa:  # nothing else than the test of another set
            assert not request.config.getoption("record_passed"), f"this processor has no {isa}"
            return
        folder, environment = sanitized()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-v",
                "-x",
                "-o",
                "pythonpath=tests/support",
                *native_tests.arguments(*ops),
            ],
            cwd=folder,
            env=environment | {"INR_KERNELS_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert not native_tests.missing(done.stdout, ops), "no test has this name"

    if_changed(run, {op: native_tests.files(op) for op in native_tests.OPS})
