"""Compiles the Triton kernels of an op ahead of time and prints their resources as JSON lines. Needs no GPU.

    python tests/support/compile_triton.py ARCH OP [--folder FOLDER] [--known FILE]

ARCH: 80, 89, 90 or 120; OP: an op's name or "all". TRITON_INTERPRET must not be set. With a folder, the kernels' cubins
are written there. With a file of known keys, one a line, kernels that have these keys are not compiled, and of them
only the key is printed: a hash of Triton's version, the kernel's source and all that specializes it. The launches come
from the ops' case modules: `compilations(dtype, arch)` of tests/support/<op>_cases.py calls the op's launch code with
tensors of typical shapes and yields a label before each call. Triton is given a driver without a device, and each
launch stops after its compilation, so that what is compiled is exactly what the launch code requests.
"""

import argparse
import hashlib
import importlib
import json
import pkgutil
import re
import subprocess
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
OLDEST = re.search(r'"triton>=([\d.]+)', (Path(__file__).parents[2] / "pyproject.toml").read_text())[1] + ".0"
# conv2d and conv3x3 are parts of fourier_unit and have no kernels; local_texture's are those of local_implicit.
TRITON_OPS = [name for name, op in OPS.items() if "triton" in op.backends and (PACKAGE / name).is_dir()]


def jitted(op):
    """{name: the jitted function} of the op's Triton modules."""
    package = importlib.import_module(f"inr_kernels.{op}.triton_kernels")
    submodules = pkgutil.iter_modules(getattr(package, "__path__", []))
    modules = [package, *(importlib.import_module(f"{package.__name__}.{module.name}") for module in submodules)]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, (JITFunction, InterpretedFunction))
    }


def kernels(op):
    """{name: whether it multiplies matrices} of the op's kernels: the jitted functions that no other one calls."""
    uses = {name: set(function.fn.__code__.co_names) for name, function in jitted(op).items()}

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


def key_of(function, specialization):
    """A hash of Triton's version, a kernel's source and, from Triton's JSON text, all that specializes it."""
    specialization = json.loads(specialization)
    del specialization["options"]["extern_libs"]  # paths
    text = json.dumps([triton.__version__, function.cache_key, specialization])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def compile_op(arch, op, known=()):
    """Yields (row, kernel) for every kernel that the op's launches compile; `mode` is the first label that needs it.

    Of kernels whose key is in `known` the row is {"key": key}, and the kernel None.
    """
    compiled, label, keys = {}, {}, []
    launch = JITFunction.run
    for function in jitted(op).values():
        function.starting_line_number = 0  # which the key would depend on

    def is_known(*, fn, compile, **_):
        keys.append(key_of(fn.jit_function, compile["specialization_data"]))
        return keys[-1] in known

    def compile_only(self, *args, grid, warmup, **options):
        keys.clear()
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if keys:  # else compiled before
            compiled[keys[0]] = (self.__name__, dict(label), kernel)

    JITFunction.run, triton.knobs.runtime.jit_cache_hook = compile_only, is_known
    try:
        for dtype in (torch.bfloat16, torch.float32):
            for mode in importlib.import_module(f"{op}_cases").compilations(dtype, arch):
                label.update(dtype=str(dtype).removeprefix("torch."), mode=mode)
    finally:
        JITFunction.run, triton.knobs.runtime.jit_cache_hook = launch, None
    for key, (name, labels, kernel) in compiled.items():
        row = {"triton": triton.__version__, "arch": arch, "op": op, "kernel": name, **labels}
        yield {"key": key} | (row if kernel else {}), kernel


def main():
    """Prints a line for each kernel."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("op")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--known", type=Path)
    args = parser.parse_args()
    known = set(args.known.read_text().split()) if args.known else set()
    triton.runtime.driver.set_active(Driver(args.arch))
    for name in TRITON_OPS if args.op == "all" else [args.op]:
        for row, kernel in compile_op(args.arch, name, known):
            if kernel:
                row |= resources(kernel)
            if kernel and args.folder:
                row["cubin"] = str(args.folder / f"{kernel.hash}.cubin")
                Path(row["cubin"]).write_bytes(kernel.asm["cubin"])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
