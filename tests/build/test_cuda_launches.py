"""The launches of the CUDA kernels, without a GPU: the host code that nvcc compiled, over a stand-in for the runtime.

They run again where files have changed, see `if_changed`. A library built without CUDA has no launches; the tests then
check nothing.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import emulated_cuda
import launch_cuda
import pytest
import torch
from tree import ROOT

from inr_kernels import _C
from inr_kernels._core import native
from inr_kernels._core.dispatch import always

pytestmark = pytest.mark.slow
CHIPS = [80, 86, 89, 90, 100, 120]
VERSIONS = f"{_C.cuda_version} {_C.cuda_archs}"  # of nvcc and the machine code


def is_compiled(chip):
    """Whether the library has machine code for the chip."""
    return str(chip) in _C.cuda_archs.split(",")


def files(op):
    """Patterns of the files that an op's launches depend on."""
    sources = ["CMakeLists.txt", "csrc/inr.h", "csrc/bindings.*", "csrc/common/*"]
    sources += [f"csrc/cuda/{name}" for name in (f"{op}*", "launch*", "ptx.cuh", "hopper.cuh")]
    ours = [f"inr_kernels/_core/{name}.py" for name in ("backends", "dispatch", "native", "registration")]
    ours += [f"inr_kernels/{op}/**/*.py"]
    names = ["launch_cuda.py", "launch_triton.py", "compile_triton.py", "tree.py", "gpu_limits.py", "stub_driver/*"]
    names += [f"{op}_cases.py"]
    tests = [f"tests/ops/test_{op}_cuda.py", "tests/ops/test_on_gpu.py", "tests/build/test_cuda_launches.py"]
    return [*sources, *ours, *(f"tests/support/{name}" for name in names), *tests]


PARTS = {op: files(op) for op in launch_cuda.KERNELS}


@pytest.fixture(scope="session")
def launch(built_once):
    """launch(chip, *options) -> the rows that `launch_cuda.py` prints."""

    def run(chip, *options):
        folder = built_once("cuda_launches", launch_cuda.build)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, ROOT / "tests/support/launch_cuda.py", str(chip), folder, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        print(done.stdout)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize("chip", CHIPS)
def test_every_problem_reaches_the_driver(chip, launch, if_changed):
    """Of the GPU tests, and of the CUDA kernels' own."""
    if not is_compiled(chip):
        return

    def run(ops):
        rows = launch(chip, "--ops", *ops)
        assert [row["op"] for row in rows] == ops
        for row in rows:
            hopper = {"decode_sm90"} if chip == 90 and row["op"] == "local_implicit" else set()
            assert not row["errors"]
            assert set(row["launches"]) == {*launch_cuda.KERNELS[row["op"]]} | hopper
            assert row["cases"] > 100

    if_changed(run, PARTS, VERSIONS)


NO_DEVICE, NO_MEMORY, FAILED = (
    f"RuntimeError: CUDA: {text}"
    for text in ("no CUDA-capable device is detected", "out of memory", "unspecified launch failure")
)


def test_what_the_runtime_refuses(launch, if_changed):
    """Every call's error is raised, nothing is launched after it, and the next call is as before."""
    if not is_compiled(90):
        return

    def run(_):
        found = {}
        for row in launch(90, "--failures"):
            found.setdefault(row["op"], []).append((row["error"], sum(row["launches"].values())))
        launched = [(NO_MEMORY, 0), (FAILED, 0)]
        assert found == {
            "local_implicit": [(NO_DEVICE, 1), (FAILED, 1), (FAILED, 1), *launched, (None, 2)],
            "elementwise_filter": [(None, 2), (None, 2), (FAILED, 1), *launched, (None, 2)],
            "neighborhood_attention": [(None, 3), (None, 3), (FAILED, 1), *launched, (None, 3)],
        }

    if_changed(run, PARTS, VERSIONS)


def test_the_machine_code_has_the_parameters_of_the_launch_code(built_once, if_changed, monkeypatch):
    """Their number and sizes, as g++ lays each kernel's parameters out, are those in the machine code for sm_90."""
    if not is_compiled(90):
        return

    def run(ops):
        library = emulated_cuda.load(built_once("emulated_cuda", emulated_cuda.build))
        monkeypatch.setattr(native, "load", lambda: (emulated_cuda.Native(library), ""))
        emulated_cuda.launches(library)
        library.set_shared_limit(227 << 10)
        for op in ops:
            module = launch_cuda.MODULES[op]
            kinds = [module.cuda_backend(), *([module.cuda_backend("wgmma")] if op == "local_implicit" else [])]
            for backend in kinds:
                monkeypatch.setitem(module.OP.backends, "cuda", replace(backend, why_not=always))
                launch_cuda.CASES[op](**launch_cuda.FAILING[op]).run(torch.float16, "cuda")
        found = {tuple(filter(None, launch.sizes)) for launch in emulated_cuda.launches(library)}
        kernels = launch_cuda.machine_code(90).items()
        assert found == {tuple(code.sizes) for name, code in kernels if any(op in name for op in ops)}

    if_changed(run, {op: [*PARTS[op], *emulated_cuda.files(op)] for op in PARTS}, VERSIONS)


# The text that must be found for each fault of `launch_cuda.faults`.
FAULTS = {
    "stream": "stream 0x0",
    "beyond": "an address beyond the tensors",
    "host": "is an address of the host",
    "no machine code": "no machine code for this chip",
    "registers": "256 threads, where",
    "shared_limit": "CUDA: more shared memory than a block may opt in to",
    "clusters": "CUDA: no clusters on this GPU",
}


def test_wrong_launches_are_found(launch, if_changed):
    if not is_compiled(90):
        return

    def run(_):
        rows = launch(90, "--faults")
        found = {row["fault"]: "\n".join([str(row["error"]), *row["errors"]]) for row in rows}
        assert found.keys() == FAULTS.keys()
        assert not [name for name, text in FAULTS.items() if text not in found[name]]
        # Every address is reported.
        wrong = {name: set(re.findall(rf"(.*): .*{FAULTS[name]}", found[name])) for name in ("beyond", "host")}
        assert wrong["host"] == wrong["beyond"]

    if_changed(run, {"local_implicit": PARTS["local_implicit"]}, VERSIONS)
