"""What the ops' backends share: whether C++ and Triton can run, and how a tensor reaches native code."""

import contextlib
import os
import re
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


def why_not_cuda(facts: Facts) -> str:
    """The CUDA C++ kernels: CUDA tensors in half precision, on a GPU whose machine code was compiled."""
    if facts.device.type != "cuda":
        return f"it takes CUDA tensors; these are on {facts.device}"
    library, reason = native.load()
    if library is None:
        return reason
    if not library.cuda_archs:
        return "inr_kernels._C was built without CUDA: there was no nvcc on PATH, or INR_KERNELS_CUDA=0"
    if facts.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16; got {str(facts.dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(facts.device)
    compiled = [int(arch) for arch in re.findall(r"\d+", library.cuda_archs)]
    # Machine code runs on later chips of the same major version.
    if any(arch // 10 == major and arch % 10 <= minor for arch in compiled):
        return ""
    return f"it was compiled for sm_{library.cuda_archs.replace(',', ', ')}; this GPU has {major}.{minor}"


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
    """The context in which a GPU kernel starts on the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def stream(device) -> int:
    """The address of the device's current stream; 0 where there is none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device) -> bool:
    """Whether a CUDA graph is captured: what it computes is there in a replay alone, and what it reads for ever."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def precision() -> str:
    """What `tl.dot` makes of float32: as torch's own matrix products are told to."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
