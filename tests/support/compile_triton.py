"""Compiles the Triton kernels of an op ahead of time and prints their resources as JSON lines. Needs no GPU.

    python tests/support/compile_triton.py ARCH OP [FOLDER]      ARCH: 80, 89, 90 or 120; OP: an op's name or "all"

TRITON_INTERPRET must not be set. With a FOLDER, the kernels' cubins are written there. The launches come from the ops'
case modules: `compilations(dtype, arch)` of tests/support/<op>_cases.py calls the op's launch code with tensors of
typical shapes and yields a label before each call. Triton is given a driver without a device, and each launch stops
after its compilation, so that what is compiled is exactly what the launch code requests.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import inr_kernels  # registers the ops
from inr_kernels._core.dispatch import OPS

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")  # in PTX
PACKAGE = Path(inr_kernels.__file__).parent
# conv3x3 is a part of fourier_unit and has no kernels; local_texture's are those of local_implicit.
TRITON_OPS = [name for name, op in OPS.items() if "triton" in op.backends and (PACKAGE / name).is_dir()]


def kernels(op):
    """{name: whether it multiplies matrices} of the op's kernels: the jitted functions that no other one calls."""
    package = importlib.import_module(f"inr_kernels.{op}.triton_kernels")
    submodules = pkgutil.iter_modules(getattr(package, "__path__", []))
    modules = [package, *(importlib.import_module(f"{package.__name__}.{module.name}") for module in submodules)]
    jitted = {
        name: value.fn
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, (JITFunction, InterpretedFunction))
    }
    uses = {name: set(function.__code__.co_names) for name, function in jitted.items()}

    def multiplies(name):
        return "dot" in uses[name] or any(multiplies(called) for called in uses[name] & uses.keys())

    return {name: multiplies(name) for name in uses.keys() - set().union(*uses.values())}


class Driver:
    """The part of a Triton driver that compilation needs."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(kernel):
    """The registers, stack and shared memory of a compiled kernel, and whether it uses tensor cores."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "tensor_cores": bool(TENSOR_CORE.search(kernel.asm["ptx"])),
    }


def compile_op(arch, op):
    """Yields (row, kernel) for every kernel that the op's launches compile; `mode` is the first label that needs it."""
    compiled, label = {}, {}
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.hash, (self.__name__, dict(label), kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        for dtype in (torch.bfloat16, torch.float32):
            for mode in importlib.import_module(f"{op}_cases").compilations(dtype, arch):
                label.update(dtype=str(dtype).removeprefix("torch."), mode=mode)
    finally:
        JITFunction.run = launch
    for name, labels, kernel in compiled.values():
        yield {"triton": triton.__version__, "arch": arch, "op": op, "kernel": name, **labels}, kernel


def main(arch, op, folder=None):
    """Prints a line for each kernel."""
    triton.runtime.driver.set_active(Driver(arch))
    for name in TRITON_OPS if op == "all" else [op]:
        for row, kernel in compile_op(arch, name):
            row |= resources(kernel)
            if folder:
                row["cubin"] = str(Path(folder, f"{kernel.hash}.cubin"))
                Path(row["cubin"]).write_bytes(kernel.asm["cubin"])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
