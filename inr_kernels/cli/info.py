"""Show this machine, the installed versions, and which implementation of each operator runs here."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

import inr_kernels
from inr_kernels._core import native
from inr_kernels._core.dispatch import OPS, Op

from .machine import free_memory, processor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`inr-kernels info` has no options."""


def run(args: argparse.Namespace) -> None:
    """Prints the facts, then for each operator its backends and why one does not run."""
    library, reason = native.load()
    free = free_memory()
    memory = f", {free / 1e9:.1f} GB of memory free" if free else ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "inr_kernels": inr_kernels.__version__,
        "system": f"{platform.platform()}, {os.cpu_count()} cores{memory}",
        "processor": processor(),
        "GPUs": ", ".join(gpus) or "none found by PyTorch",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "pillow")},
        "threads": torch.get_num_threads(),
        "kernels": f"compiled; using {library.isa()} here" if library else reason,
        "CUDA archs": (library.cuda_archs if library else "") or "none compiled",
    }
    for name, fact in facts.items():
        print(f"{name:12s} {fact}")
    for op in OPS.values():
        for device in ["cpu", *(["cuda"] if gpus else [])]:
            print(f"\n{op.name} on {device}, float32")
            for backend, why_not in _backends(op, device):
                print(f"  {backend:10s} {why_not or 'runs'}")


def _backends(op: Op, device: str) -> Iterator[tuple[str, str]]:
    """Each backend of an op, and why it cannot run on a device, "" if it can."""
    facts = op.facts(torch.empty(1, 1, 1, 1, dtype=torch.float32, device=device))
    for name, backend in op.backends.items():
        yield name, backend.why_not(facts)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
