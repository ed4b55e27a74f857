"""Sends problems of the GPU tests through Triton's own launch path, over a stand-in for the driver. Needs no GPU.

    python tests/support/launch_triton.py ARCH FOLDER [--dtypes ...] [--ops ...] [--whole | --large | --refused]

FOLDER holds the stand-in, libcuda.so.1, which `build` compiles; LD_LIBRARY_PATH must contain it, and TRITON_INTERPRET
must not be set. Real are Triton's binder, specialization, compiler, loader and launcher in C; the driver checks the
launch (grid, threads, shared memory) and records it, and the record is compared here with what the kernel was called
with. One line of JSON for each op.

Without --whole, the compiler ends after its front end, and each kernel gets as much shared memory as ARCH has.
--large: instead of the GPU tests' problems, calls with more than 65,535 images, the limit of two of the grid's axes.
--refused: launches that the driver must refuse; the errors.
"""

import argparse
import ctypes
import json
import re
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl
from compile_triton import Driver
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend

ROOT = Path(__file__).parents[2]
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
STREAM = 0x5EED
SIZES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2, "i32": 4, "u32": 4, "fp32": 4}
LARGE = {
    "local_implicit": {"batch": 70_000, "channels": 1, "size": (1, 1), "queries": 1, "hidden": (1,), "out": 1},
    "local_texture": {"batch": 70_000, "size": (1, 1), "queries": 1},
    "elementwise_filter": {"batch": 70_000, "channels": 1, "groups": 1, "size": (1, 1)},
    "unmask_attention": {"shape": (70_000, 1, 1, 2)},
    "neighborhood_attention": {"batch": 70_000, "size": (1, 1), "kernel_size": 1, "heads": 1, "dim": 1, "bias": True},
    "fourier_unit": {"batch": 700, "channels": 100, "outputs": 1, "size": (1, 1)},
}


def build(folder):
    """Compiles the stand-in for the driver into the folder."""
    headers = Path(nvidia.__file__).parent / "include"
    source, library = ROOT / "tests/support/stub_driver/cuda.c", Path(folder) / "libcuda.so.1"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", f"-I{headers}", source, "-o", library]
    subprocess.run(command, check=True)


class Launched(ctypes.Structure):
    """`launched` of cuda.c."""

    _fields_ = [
        ("count", ctypes.c_long),
        *[(name, ctypes.c_uint * 3) for name in ("grid", "block")],
        *[(name, ctypes.c_uint) for name in ("shared", "attributes")],
        *[(name, ctypes.c_ulonglong) for name in ("stream", "function")],
        ("parameters", ctypes.c_ulonglong * 64),
    ]


def flat(values):
    """The leaves of nested tuples, in order."""
    return [leaf for v in values for leaf in flat(v)] if isinstance(values, (tuple, list)) else [values]


class Launcher(nvidia.CudaLauncher):
    """Triton's launcher; tells the stand-in the parameters' sizes before a launch, and compares it afterwards."""

    library: ctypes.CDLL  # the stand-in
    seen = Counter()  # launches by kernel

    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        self.signature, self.metadata = list(src.signature.values()), metadata

    def __call__(self, *values):
        grid, given = values[:3], values[-len(self.signature) :]
        types, given = flat(self.signature), flat(given)
        pairs = [(kind, value) for kind, value in zip(types, given, strict=True) if kind != "constexpr"]
        sizes = [SIZES.get(kind, 8) for kind, _ in pairs]
        (ctypes.c_int * 64).in_dll(self.library, "parameter_sizes")[: len(sizes)] = sizes
        ctypes.c_int.in_dll(self.library, "parameter_count").value = len(sizes)
        launched = Launched.in_dll(self.library, "launched")
        before = launched.count
        super().__call__(*values)
        if launched.count != before + 1:
            raise AssertionError(f"{self.metadata.name}: the launch of {grid} did not arrive")
        name = self.library.name_of(launched.function).decode()
        expected = [_bytes(kind, value) for kind, value in pairs]
        found = list(launched.parameters)[: len(pairs)]
        checks = {
            "kernel": (name, self.metadata.name),
            "grid": (tuple(launched.grid), grid),
            "threads": (tuple(launched.block), (32 * self.metadata.num_warps, 1, 1)),
            "shared memory": (launched.shared, self.metadata.shared),
            "stream": (launched.stream, STREAM),
            "parameters": (found, expected),
        }
        if wrong := {key: pair for key, pair in checks.items() if pair[0] != pair[1]}:
            raise AssertionError(f"{name}: launched with {wrong}")
        self.seen[name] += 1


def _bytes(kind, value):
    """A parameter's first 8 bytes as a number."""
    if kind[0] == "*":
        return 0 if value is None else value.data_ptr()
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return value % (1 << 8 * SIZES.get(kind, 8))


class LaunchDriver(Driver):
    """A Triton driver whose device is the stand-in's."""

    launcher_cls = Launcher

    def __init__(self, arch):
        super().__init__(arch)
        self.utils = nvidia.CudaUtils()

    def get_current_stream(self, device):
        return STREAM

    def get_active_torch_device(self):
        return torch.device("cpu")


class FrontEnd:
    """In the block, the compiler ends after the front end, unless it is to run as a whole.

    shared: the bytes of shared memory that each kernel then needs.
    """

    def __init__(self, shared, whole):
        self.shared, self.whole = shared, whole

    def __enter__(self):
        add_stages = CUDABackend.add_stages

        def change(backend, stages, *args):
            add_stages(backend, stages, *args)
            if not self.whole:
                for name in [name for name in stages if name != "ttir"]:
                    stages[name] = getattr(self, name, lambda source, metadata: source)

        self.patch = mock.patch.object(CUDABackend, "add_stages", change)
        self.patch.__enter__()

    def __exit__(self, *error):
        self.patch.__exit__(*error)

    def cubin(self, source, metadata):
        """What the compiler's back end adds to the metadata."""
        metadata["name"] = re.search(r"tt\.func public @(\w+)", str(source))[1]
        metadata["shared"] = self.shared
        for name in ("tmem_size", "global_scratch_size", "profile_scratch_size"):
            metadata[name] = 0
        for name in ("global_scratch_align", "profile_scratch_align"):
            metadata[name] = 1
        return b"a kernel"


@triton.jit
def touch(out):
    """A kernel to launch with a wrong grid."""
    tl.store(out, 1.0)


def refused(compiler):
    """The errors of launches that a driver refuses, or that Triton leaves out."""
    for grid in ((1, 70_000), (1, 1, 70_000), (1 << 16, 65_535)):
        with compiler:
            yield grid, _error(lambda grid=grid: touch[grid](torch.empty(1)))
    with compiler, mock.patch.object(compiler, "shared", compiler.shared + 1024):
        touch.device_caches.clear()
        yield "shared memory", _error(lambda: touch[(1,)](torch.empty(1, dtype=torch.float64)))


def _error(run):
    try:
        run()
    except Exception as error:
        return str(error)


def problems(gpu, op, dtypes, large):
    """(dtype, options) of an op's problems, as test_on_gpu.py selects them."""
    for remainder, dtype in enumerate(gpu.DTYPES):
        if str(dtype).removeprefix("torch.") not in dtypes:
            continue
        if large:
            yield dtype, LARGE[op]
            continue
        for i, (_, options) in enumerate(gpu.CASES[op].gpu_problems(dtype)):
            if i == 0 or i % len(gpu.DTYPES) == remainder:
                yield dtype, options


def main():
    """Prints, for each op: the cases, the launches that arrived by kernel, what went wrong, and the seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--ops", nargs="+", default=list(LARGE))
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--refused", action="store_true")
    args = parser.parse_args()
    sys.path.append(str(ROOT / "tests/ops"))
    import test_on_gpu as gpu

    from inr_kernels._core.dispatch import OPS, always
    from inr_kernels.local_implicit import triton_kernels as local_implicit

    Launcher.library = ctypes.CDLL(str(args.folder / "libcuda.so.1"))
    Launcher.library.name_of.restype, Launcher.library.name_of.argtypes = ctypes.c_char_p, [ctypes.c_ulonglong]
    ctypes.c_int.in_dll(Launcher.library, "shared_limit").value = SHARED[args.arch]
    nvidia.library_dirs = lambda: [nvidia.libdevice_dir, str(args.folder)]
    triton.runtime.driver.set_active(LaunchDriver(args.arch))
    local_implicit.capability = lambda device: divmod(args.arch, 10)
    compiler = FrontEnd(SHARED[args.arch], args.whole)
    if args.refused:
        print(json.dumps({str(launch): error for launch, error in refused(compiler)}))
        return
    for op in args.ops:
        OPS[op].backends["triton"] = replace(OPS[op].backends["triton"], why_not=always)
        start, errors, cases = time.time(), [], 0
        Launcher.seen.clear()
        for dtype, options in problems(gpu, op, args.dtypes, args.large):
            cases += 1
            torch.manual_seed(0)
            try:
                with compiler:
                    gpu.CASES[op].Case(**options).run(dtype, "triton")
            except Exception as error:
                errors.append(f"{dtype} {options}: {type(error).__name__}: {str(error)[:500]}")
        row = {"triton": triton.__version__, "op": op, "cases": cases, "launches": Launcher.seen, "errors": errors}
        print(json.dumps(row | {"seconds": round(time.time() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
