"""The command `inr-kernels info`."""

import argparse
import os
import platform

import torch

from inr_kernels import __version__, explain
from inr_kernels._core import devices, native, proof, verdicts
from inr_kernels._core.dispatch import OPS, VARIABLE

from .machine import free_memory


def run(args: argparse.Namespace) -> None:
    """Prints the facts, then for each operator its backends, why one does not run, and which one does."""
    library, reason = native.load()
    free = free_memory()
    memory = f", {free / 1e9:.1f} GB of memory free" if free else ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "inr_kernels": __version__,
        "system": f"{platform.platform()}, {os.cpu_count()} cores{memory}",
        "processor": devices.processor(),
        "GPUs": ", ".join(gpus) or "none found by PyTorch",
        "python": platform.python_version(),
        **{name: devices.version(name) for name in ("torch", "triton", "numpy", "pillow")},
        "threads": torch.get_num_threads(),
        "kernels": f"compiled; using {library.isa()} here" if library else reason,
        "CUDA archs": (library.cuda_archs if library else "") or "none compiled",
        **{name: os.environ.get(name) or "not set" for name in (VARIABLE, proof.VARIABLE)},
        "verdicts": f"{sum(map(len, verdicts.stored().values()))} in {verdicts.file()}",
    }
    for name, fact in facts.items():
        print(f"{name:12s} {fact}")
    for name in OPS:
        for device in [torch.device("cpu"), *(gpu.torch for gpu in devices.gpus())]:
            print()
            explain(name, torch.empty(1, 1, 1, 1, dtype=torch.float32, device=device))
