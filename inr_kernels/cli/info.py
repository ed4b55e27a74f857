"""Show the machine, the versions, and which backends run here, or why not."""

import importlib.metadata
import os
import platform

import torch

import inr_kernels
from inr_kernels._core import native
from inr_kernels._core.dispatch import OPS

from .machine import free_memory, processor


def add_arguments(parser):
    """`inr-kernels info` takes none."""


def run(args):
    """Prints a line for each fact."""
    library, reason = native.load()
    free = free_memory()
    memory = f", {free / 1e9:.1f} GB free" if free else ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "inr_kernels": inr_kernels.__version__,
        "system": f"{platform.platform()}, {os.cpu_count()} cores{memory}",
        "processor": processor(),
        "GPUs": ", ".join(gpus) or "none that torch.cuda sees",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "pillow")},
        "threads": torch.get_num_threads(),
        "kernels": f"compiled, for {library.isa()} here" if library else reason,
        "CUDA archs": (library.cuda_archs or "none compiled") if library else "none compiled",
    }
    for name, fact in facts.items():
        print(f"{name:12s} {fact}")
    devices = ["cpu", *(["cuda"] if gpus else [])]
    for op in OPS.values():
        for device in devices:
            print(f"\n{op.name} on {device}, float32")
            known = op.facts(torch.empty(1, 1, 1, 1, device=device))
            for name, backend in op.backends.items():
                print(f"  {name:10s} {backend.why_not(known) or 'runs'}")


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
