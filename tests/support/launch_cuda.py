"""Sends problems of the GPU tests through the launch code of the CUDA kernels, over a stand-in. Needs no GPU.

    python tests/support/launch_cuda.py ARCH FOLDER [--ops ... | --failures | --faults]

FOLDER is what `build` made: the package, in which `_C` is linked again from the objects of the installed one, with
libcudart.so of tests/support/stub_driver in place of the CUDA runtime; PYTHONPATH must begin with it. Python, the
bindings and the host code are the real ones, up to their calls of the runtime. NVIDIA's runtime cannot be used, because
it needs NVIDIA's driver. The stand-in checks grid, threads, shared memory and clusters as the driver does. Compared
here are the stream, the attributes, the pointers in the parameters, and what the machine code for ARCH says of each
kernel: the sizes of its parameters, its threads and its registers. Tensors have addresses outside of this process, so
that launch code that reads a tensor crashes. Addresses of the host are found, but for those that may be a bool or a
small integer before padding.

One line of JSON for each op. --failures: what calls of the runtime return as errors, as Python raises it. --faults:
what is found in launches that are wrong.
"""

import argparse
import contextlib
import ctypes
import importlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from gpu_limits import unless_refused
from launch_triton import LARGE, SHARED, STREAM, Launched, problems
from tree import ROOT

from inr_kernels import _C
from inr_kernels._core import backends

MODULES = {
    op: importlib.import_module(f"inr_kernels.{op}.op")
    for op in ("local_implicit", "elementwise_filter", "neighborhood_attention")
}
CASES = {op: importlib.import_module(f"{op}_cases").Case for op in MODULES}
TOOLS = Path(triton.__file__).parent / "backends/nvidia"
HALVES = [torch.bfloat16, torch.float16]
KERNELS = {
    "local_implicit": ["pack_weights", "decode"],
    "elementwise_filter": ["filter_3x3", "filter_taps", "gradients"],
    "neighborhood_attention": ["attend", "query_backward", "key_value_backward"],
}
REGISTERS = 64 << 10  # of a multiprocessor
# For sm_90, the first makes every call of the runtime, and the others opt in to shared memory in their backward.
FAILING = {
    "local_implicit": {"batch": 1, "hidden": (256, 256)},
    "elementwise_filter": {"size": (32, 32), "kernel_size": (5, 5)},
    "neighborhood_attention": {"size": (16, 16), "kernel_size": 16, "dim": 32, "bias": True},
}


def build(folder):
    """Compiles the stand-in, and links the objects of the installed `_C` to it, in a copy of the package."""
    native, installed, package = ROOT / "build" / "native", Path(_C.__file__), Path(folder) / "inr_kernels"
    built = native / installed.name
    if not built.is_file() or built.read_bytes() != installed.read_bytes():
        raise RuntimeError(f"{installed} is not the library in {native}: run `pip install -e .`")
    sources = [ROOT / "tests/support/stub_driver" / name for name in ("cuda.c", "cudart.c")]
    runtime = Path(folder) / "libcudart.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", f"-I{TOOLS / 'include'}", *sources, "-o", runtime]
    subprocess.run(command, check=True)
    package.mkdir()
    for path in [*(ROOT / "inr_kernels").iterdir(), ROOT / "models"]:
        if path != installed:
            (package / path.name).symlink_to(path)
    # The lowest instruction set first, as in CMakeLists.txt.
    first = ["inr_bindings.dir", "inr_common.dir", "inr_cpu_generic.dir"]
    objects = native.glob("CMakeFiles/inr_*.dir/**/*.o")
    objects = sorted(objects, key=lambda path: [part not in path.parts for part in first])
    subprocess.run(["g++", "-shared", *objects, runtime, "-pthread", "-o", package / installed.name], check=True)


def machine_code(arch):
    """{kernel: the sizes of its parameters, its threads and registers} of the machine code for a chip."""
    command = [TOOLS / "bin/cuobjdump", "--dump-elf", "--gpu-architecture", f"sm_{arch}", _C.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = dict(re.findall(r"function: (\S+)\(\w+\)\s+register count: (\d+)", text))
    kernels = {}
    for name, facts in re.findall(r"^\.nv\.info\.(\S+)\n((?:[ \t].*\n)+)", text, re.MULTILINE):
        found = re.findall(r"Ordinal : (\w+)\s+Offset  : \w+\s+Size    : (\w+)", facts)
        sizes = dict(sorted((int(ordinal, 16), int(size, 16)) for ordinal, size in found))
        threads = re.search(r"EIATTR_MAX_THREADS\n.*\n\s+Value:\s+(\w+)", facts)
        threads = int(threads[1], 16) if threads else 1024
        registers = -(-int(counts[name]) // 8) * 8  # as they are allocated
        kernels[name] = SimpleNamespace(sizes=[*sizes.values()], threads=threads, registers=registers)
    return kernels


class Memory:
    """Addresses of tensors' storages as on a GPU: aligned to 512 bytes, and not of this process."""

    BEGIN, GAP = 0x6A00 << 32, 1 << 20
    real = torch.Tensor.data_ptr

    def __init__(self):
        self.storages, self.end = {}, self.BEGIN

    def data_ptr(self, tensor):
        """Replaces torch.Tensor.data_ptr."""
        if not tensor.numel():
            return 0
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in self.storages:
            self.storages[key] = self.end + self.GAP
            self.end += self.GAP + -(-key[1] // 512) * 512
        return self.storages[key] + Memory.real(tensor) - key[0]

    def contains(self, pointer):
        """Whether a pointer is in one of the storages."""
        return any(begin <= pointer < begin + size for (_, size), begin in self.storages.items())


def process_memory():
    """(begin, end) of this process's memory."""
    found = re.findall(r"^(\w+)-(\w+)", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return [(int(begin, 16), int(end, 16)) for begin, end in found]


class Driver:
    """The stand-in, and the checks of what it recorded."""

    def __init__(self, folder, arch):
        self.stub = ctypes.CDLL(str(folder / "libcudart.so"))
        self.stub.name_of.restype, self.stub.name_of.argtypes = ctypes.c_char_p, [ctypes.c_ulonglong]
        self.set(shared_limit=SHARED[arch], clusters=arch >= 90)
        self.kernels, self.memory = machine_code(arch), Memory()
        self.launches, self.errors = Counter(), []
        self.callback = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p))(self.check)
        ctypes.c_void_p.in_dll(self.stub, "arrived").value = ctypes.cast(self.callback, ctypes.c_void_p).value

    def set(self, **variables):
        """Sets ints of the stand-in."""
        for name, value in variables.items():
            ctypes.c_int.in_dll(self.stub, name).value = value

    @contextlib.contextmanager
    def failing(self, call, error):
        """In the block, a call of the runtime returns an error."""
        name = ctypes.c_char_p.in_dll(self.stub, "failing")
        self.set(failure=error)
        name.value = call.encode()
        try:
            yield
        finally:
            name.value = b""

    def check(self, parameters):
        """Called at each launch. Errors are collected, as nothing catches an exception here."""
        try:
            launched = Launched.in_dll(self.stub, "launched")
            name = self.stub.name_of(launched.function).decode()
            found = re.search(f"({'|'.join(itertools.chain(*KERNELS.values()))})I", name)
            if not found:
                self.errors.append(f"unknown kernel {name}")
                return
            short = found[1] + ("_sm90" if "_sm90_" in name else "")
            self.launches[short] += 1
            self.errors += [f"{short}: {error}" for error in self.wrong(self.kernels.get(name), launched, parameters)]
            if launched.attributes != short.endswith("_sm90"):
                self.errors.append(f"{short}: {launched.attributes} attributes")
        except Exception as error:
            self.errors.append(repr(error))

    def wrong(self, kernel, launched, parameters):
        """What is wrong with a launch of a kernel."""
        if launched.stream != STREAM:
            yield f"stream {launched.stream:#x}"
        if not kernel:
            yield "no machine code for this chip"
            return
        threads = launched.block[0] * launched.block[1] * launched.block[2]
        if threads > kernel.threads or threads * kernel.registers > REGISTERS:
            yield f"{threads} threads, where {kernel.threads} are possible, with {kernel.registers} registers"
        ours, tensors = process_memory(), 0
        for i, size in enumerate(kernel.sizes):
            value = ctypes.string_at(parameters[i], size)
            for at in range(0, size - 7, 8):
                word = int.from_bytes(value[at : at + 8], "little")
                if self.memory.contains(word):
                    tensors += 1
                elif Memory.BEGIN <= word < Memory.BEGIN + (1 << 40):
                    yield f"parameter {i}, byte {at}: an address beyond the tensors"
                elif is_address(word) and any(begin <= word < end for begin, end in ours):
                    yield f"parameter {i}, byte {at}: {word:#x} is an address of the host"
        if tensors < 2:
            yield f"{tensors} tensors among the parameters"


def is_address(word):
    """Whether 8 bytes can be an address, and not a bool or a small integer before padding, whose bytes are any."""
    return word % 256 > 1 and word % 2**32 >= 2**16


class NotCuda(Exception):
    """Raised where the backward is Triton's."""


def no_triton(*args, **needs):
    """Replaces Triton's backward."""
    raise NotCuda


def use_gpu(arch):
    """Makes backend="cuda" take CPU tensors, as if they were on a GPU."""
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    backends.stream = lambda device: STREAM
    for module in MODULES.values():
        module._TRITON = replace(module._TRITON, backward=no_triton)
        backend = module.cuda_backend()
        why_not = lambda facts, ask=backend.why_not: ask(replace(facts, device=torch.device("cuda")))  # noqa: E731
        module.OP.backends["cuda"] = replace(backend, why_not=why_not)
    local_implicit = MODULES["local_implicit"]
    real = local_implicit.uses_wgmma

    def uses_wgmma(a, kernel=""):
        hoisted = SimpleNamespace(shape=a.hoisted.shape, is_cuda=True, device="cuda")
        return real(a._replace(hoisted=hoisted), kernel)

    local_implicit.uses_wgmma = uses_wgmma


def own_problems(op):
    """(dtype, options) of the problems that the tests of the CUDA kernels have for a GPU."""
    tests = importlib.import_module(f"test_{op}_cuda")
    if op == "elementwise_filter":
        dtypes = [torch.float32, *HALVES]
        for shape, padding, dtype in itertools.product(tests.SHAPES.values(), backends.PADDINGS, dtypes):
            if padding != "valid" or not isinstance(shape.get("dilation"), tuple):
                yield dtype, shape | {"padding": padding, "normalize": "taps", "window": True}
    elif op == "neighborhood_attention":
        paper = {"size": (64, 64), "heads": 8, "dim": 32, "kernel_size": 7, "bias": True, "layout": "packed"}
        shapes = [*(tests.SMALL | case for case in tests.CASES.values()), *(paper | {"dilation": n} for n in (1, 2, 9))]
        yield from itertools.product(HALVES, shapes)
    else:
        paper = {"channels": 64, "size": (48, 48), "queries": 30_000, "hidden": (256,) * 4}
        for shape, after, dtype in itertools.product([*tests.CASES.values(), paper], ("last", "first"), HALVES):
            yield dtype, shape | {"ensemble_after": after}
            yield dtype, shape | {"ensemble_after": after, "hidden": (*shape.get("hidden", (20, 17)), 130)}


def every_problem(op):
    """(dtype, options): the GPU tests', those of the CUDA kernels' own tests, and one of many images."""
    import test_on_gpu as gpu

    dtypes = [str(dtype).removeprefix("torch.") for dtype in gpu.DTYPES]
    yield from problems(gpu, op, dtypes, large=False)
    yield from own_problems(op)
    yield from ((dtype, LARGE[op]) for dtype in gpu.DTYPES)


def run(op, dtype, options):
    """Launches the kernels for a problem; returns the error, if one is raised."""
    torch.manual_seed(0)
    try:
        with unless_refused(), contextlib.suppress(NotCuda):
            CASES[op](**options).run(dtype, "cuda")
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def failures(driver):
    """The errors, by op and failing call, and how many launches arrived; then without a failure."""
    calls = [("cudaGetDevice", 100), ("cudaDeviceGetAttribute", 719), ("cudaFuncSetAttribute", 719)]
    for op, options in FAILING.items():
        for call, error in [*calls, ("cudaLaunchKernelExC", 2), ("cudaLaunchKernelExC", 719), ("", 0)]:
            driver.launches.clear()
            with driver.failing(call, error):
                raised = run(op, torch.float16, options)
            yield {"op": op, "call": call, "error": raised, "launches": driver.launches}


def faults(driver):
    """What is found in launches that are made wrong."""
    memory, stub = driver.memory, {"shared_limit": SHARED[90], "clusters": 1}
    beyond = lambda tensor: memory.data_ptr(tensor) + tensor.untyped_storage().nbytes()  # noqa: E731
    # Storages are aligned to 64 bytes, so that these have no lowest byte of 0.
    host = lambda tensor: Memory.real(tensor) + 16  # noqa: E731
    wrong = {
        "stream": mock.patch.object(backends, "stream", lambda device: 0),
        "beyond": mock.patch.object(torch.Tensor, "data_ptr", beyond),
        "host": mock.patch.object(torch.Tensor, "data_ptr", host),
        "no machine code": mock.patch.object(driver, "kernels", {}),
        "registers": mock.patch.object(sys.modules[__name__], "REGISTERS", 1 << 10),
        "shared_limit": contextlib.nullcontext(),
        "clusters": contextlib.nullcontext(),
    }
    for name, patch in wrong.items():
        driver.errors.clear()
        driver.set(**stub | ({name: 0} if name in stub else {}))
        with patch:
            raised = run("local_implicit", torch.float16, FAILING["local_implicit"])
        yield {"fault": name, "error": raised, "errors": driver.errors}


def main():
    """Prints, for each op: the cases, the launches that arrived by kernel, and what went wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ops", nargs="+", default=list(MODULES))
    parser.add_argument("--failures", action="store_true")
    parser.add_argument("--faults", action="store_true")
    args = parser.parse_args()
    sys.path.append(str(ROOT / "tests/ops"))
    driver = Driver(args.folder, args.arch)
    use_gpu(args.arch)
    torch.Tensor.data_ptr = lambda tensor: driver.memory.data_ptr(tensor)
    if args.failures or args.faults:
        for row in (failures if args.failures else faults)(driver):
            print(json.dumps(row))
        return
    for op in args.ops:
        driver.launches.clear()
        errors, cases = [], 0
        for dtype, options in every_problem(op):
            cases += 1
            driver.memory.storages.clear()
            driver.errors.clear()
            raised = run(op, dtype, options)
            errors += [f"{dtype} {options}: {error}" for error in [raised, *driver.errors] if error]
        print(json.dumps({"op": op, "cases": cases, "launches": driver.launches, "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
