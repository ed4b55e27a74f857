"""What the ops' backends share: whether C++ and Triton can run, and how a tensor reaches native code."""

import contextlib
import os
from dataclasses import dataclass

import torch

from . import native

# As csrc/inr.h numbers them.
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass(frozen=True)
class Facts:
    """What decides whether a backend can run; an op may know more of its own."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self):
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}"


def why_not_cpu(facts: Facts) -> str:
    """The C++ kernels: CPU tensors of any floating-point dtype."""
    if facts.device.type != "cpu":
        return f"it takes CPU tensors; these are on {facts.device}"
    return native.load()[1]


def why_not_triton(kernels, facts: Facts) -> str:
    """Triton kernels: CUDA tensors, or CPU tensors in Triton's interpreter; then what `kernels()`, the module, says."""
    try:
        module = kernels()
    except ImportError as error:
        return f"triton does not import ({error})"
    if facts.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it takes CUDA tensors; these are on {facts.device} (TRITON_INTERPRET=1 runs it there, slowly)"
    return module.why_not(facts)


def why_not_dot(facts: Facts) -> str:
    """What every Triton kernel that multiplies matrices asks for."""
    if facts.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {str(facts.dtype).removeprefix('torch.')}"
    if facts.device.type != "cuda":
        return "Triton's interpreter multiplies bfloat16 wrongly" if facts.dtype == torch.bfloat16 else ""
    major, minor = torch.cuda.get_device_capability(facts.device)
    return "" if major >= 8 else f"it needs compute capability 8.0; this GPU has {major}.{minor}"


def triton_runner(kernels):
    """(forward, backward) of the module that `kernels()` imports, not before they run."""

    def forward(*args):
        return kernels().forward(*args)

    def backward(*args, **needs):
        return kernels().backward(*args, **needs)

    return forward, backward


def address(tensor) -> int:
    """The tensor's address for native code; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def on(device):
    """The context in which a Triton kernel starts on the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def precision() -> str:
    """What `tl.dot` makes of float32: as torch's own matrix products are told to."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
