"""The command `inr-kernels info`."""

import argparse
import importlib.metadata
import os
import platform

import torch

from inr_kernels import __version__, explain
from inr_kernels._core import native
from inr_kernels._core.dispatch import OPS, VARIABLE

from .machine import free_memory, processor


def run(args: argparse.Namespace) -> None:
    """Prints the facts, then for each operator its backends, why one does not run, and which one does."""
    library, reason = native.load()
    free = free_memory()
    memory = f", {free / 1e9:.1f} GB of memory free" if free else ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "inr_kernels": __version__,
        "system": f"{platform.platform()}, {os.cpu_count()} cores{memory}",
        "processor": processor(),
        "GPUs": ", ".join(gpus) or "none found by PyTorch",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "pillow")},
        "threads": torch.get_num_threads(),
        "kernels": f"compiled; using {library.isa()} here" if library else reason,
        "CUDA archs": (library.cuda_archs if library else "") or "none compiled",
        VARIABLE: os.environ.get(VARIABLE) or "not set",
    }
    for name, fact in facts.items():
        print(f"{name:12s} {fact}")
    for name in OPS:
        for device in ["cpu", *(["cuda"] if gpus else [])]:
            print()
            explain(name, torch.empty(1, 1, 1, 1, dtype=torch.float32, device=device))


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
