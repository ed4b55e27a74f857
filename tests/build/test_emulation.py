"""The CUDA emulation under sanitizers and in random orders of warps and blocks, and a fault that only these detect.

These run again where files have changed, see `if_changed`: each compiles the emulation.
"""

import os
import signal
import subprocess
import sys

import emulated_cuda
import pytest
from tree import ROOT

pytestmark = pytest.mark.slow
# Every kernel and border: odd widths, several tiles, strided and misaligned inputs, one query.
COVERING = {
    "local_implicit": "strided or launches or (one and query and float16) or (wide and odd and last and float16)",
    "elementwise_filter": "(shapes and bfloat16) or (rectangles and reflect and bfloat16) or fold",
    "neighborhood_attention": "misaligned or (accurate and float16 and (primes or stages or dim or causal or K))",
}
PARTS = {op: [*emulated_cuda.files(op), "tests/build/test_emulation.py"] for op in COVERING}

# Decodes once with a build of the sources in sys.argv[2].
ONE_CALL = """
import sys
from dataclasses import replace
from pathlib import Path
import emulated_cuda, torch
from local_implicit_cases import Case
from inr_kernels._core import native
from inr_kernels._core.dispatch import always
from inr_kernels.local_implicit import op
library = emulated_cuda.build(sys.argv[1], Path(sys.argv[2]))
op.OP.backends["cuda"] = replace(op.cuda_backend(), why_not=always)
native.load = lambda: (emulated_cuda.Native(library), "")
Case(batch=1, queries=9, hidden=(20, 12)).decode(torch.float16, "cuda")
print("decoded")
"""


# Attends with a build of the sources in sys.argv[2], to copies before guard pages.
GUARDED_CALL = """
import sys
from dataclasses import replace
from pathlib import Path
import emulated_cuda, pytest, torch
from neighborhood_attention_cases import Case
from inr_kernels._core import native
from inr_kernels._core.dispatch import always
from inr_kernels.neighborhood_attention import op
library = emulated_cuda.build(sys.argv[1], Path(sys.argv[2]))
op.OP.backends["cuda"] = replace(op.cuda_backend(), why_not=always)
native.load = lambda: (emulated_cuda.Native(library), "")
emulated_cuda.guard_memory(pytest.MonkeyPatch())
Case(batch=1, size=(9, 11), dim=32).run(torch.float16, "cuda")
print("attended")
"""


def sanitized(*command, order=7):
    """Runs a command of Python with an emulation under ASan and UBSan, in random orders of a seed."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {"INR_EMULATION_ORDER": str(order), "INR_EMULATION_SANITIZE": "address,undefined"}
    environment |= {"PYTHONPATH": str(ROOT / "tests/support"), "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {"LD_PRELOAD": " ".join(libraries)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_under_sanitizers_in_random_orders(if_changed):
    """Each tensor is an allocation of its own, so that ASan detects an access beyond its last byte."""

    def run(changed):
        for op in changed:
            options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", "-k", f"({COVERING[op]}) and not detects"]
            done = sanitized("-m", "pytest", *options, *emulated_cuda.TESTS[op])
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]

    if_changed(run, PARTS)


def test_what_sanitizers_detect(if_changed, tmp_path):
    """A bias beyond the last one is multiplied by nothing: without them, all results are right."""

    def run(_):
        emulated_cuda.copy_with_fault(
            tmp_path, "local_implicit_weights.cu", "if (n < from.widths[row + 1])", "if (n <= from.widths[row + 1])"
        )
        done = sanitized("-c", ONE_CALL, str(tmp_path), str(tmp_path / "csrc"))
        assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "pack_weights" in done.stderr

    if_changed(run, {op: PARTS[op] for op in ["local_implicit"]})


@pytest.mark.parametrize("fault", [True, False])
def test_what_guard_pages_detect(fault, if_changed, tmp_path):
    """Keys beyond the last column of the map: masked, so that without guard pages all results are right."""

    def run(_):
        new = "column + c < end + 8 ?" if fault else "column + c < end ?"
        emulated_cuda.copy_with_fault(tmp_path, "neighborhood_attention.cuh", "column + c < end ?", new)
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tests/support")}
        command = [sys.executable, "-c", GUARDED_CALL, str(tmp_path), str(tmp_path / "csrc")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (-signal.SIGSEGV if fault else 0), done.stderr
        assert ("attended" in done.stdout) != fault

    if_changed(run, {"neighborhood_attention": PARTS["neighborhood_attention"]})
