"""What the ops' backends share: whether C++, CUDA and Triton can run, and how a tensor is passed to native code."""

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import devices, native
from .dispatch import Backend, Facts

_GRID = 65_535  # the limit of a grid's second and third axis

# The values of `Type` and `Padding` in csrc/inr.h.
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
PADDINGS = {"zeros": 0, "replicate": 1, "reflect": 2, "valid": 3}


def _is_slow(dtype):
    """Whether torch computes layers of this half-precision dtype by plain loops on this processor."""
    if not torch.backends.mkldnn.is_available():
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    is_supported = getattr(torch.ops.mkldnn, name, None)  # not public
    return is_supported is not None and not is_supported()


# What C++ kernels that compute in float32 and float64 take. They convert half precision where torch is slow: without
# oneDNN's kernels for the dtype, its layers take tens of times as long as in float32.
FLOAT_DTYPES = torch.float32, torch.float64, *filter(_is_slow, (torch.bfloat16, torch.float16))


def is_for_native(x: torch.Tensor) -> bool:
    """Whether C++ kernels that compute in float32 and float64 take this tensor."""
    return x.device.type == "cpu" and x.dtype in FLOAT_DTYPES


def why_not_cpu(facts: Facts) -> str:
    """Why the C++ kernels cannot run: they take CPU tensors of any floating-point dtype."""
    if facts.device.type != "cpu":
        return f"it takes CPU tensors; these are on {facts.device}"
    return native.load()[1]


def why_not_float(facts: Facts) -> str:
    """Why C++ kernels that compute in float32 and float64 do not run: they take `FLOAT_DTYPES` on a CPU."""
    if facts.dtype not in FLOAT_DTYPES:
        given = str(facts.dtype).removeprefix("torch.")
        return f"it takes float32 and float64, and half precision where torch is slow; got {given}"
    return why_not_cpu(facts)


def why_not_cuda(facts: Facts, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16)) -> str:
    """Why the CUDA C++ kernels cannot run: they take some dtypes on a GPU whose machine code was compiled.

    Code of a CUDA version runs with drivers of the same major version or a later one.
    """
    if facts.device.type != "cuda":
        return f"it takes CUDA tensors; these are on {facts.device}"
    library, reason = native.load()
    if library is None:
        return reason
    if not library.cuda_archs:
        return "inr_kernels._C was built without CUDA: there was no nvcc on PATH, or INR_KERNELS_CUDA=0"
    if facts.dtype not in dtypes:
        *names, last, given = (str(dtype).removeprefix("torch.") for dtype in (*dtypes, facts.dtype))
        return f"it takes {', '.join(names)} and {last}; got {given}"
    built, supported = library.cuda_version, devices.cuda_of_driver()
    if supported and int(built.split(".")[0]) > supported[0]:
        driver = ".".join(map(str, supported))
        return f"it was built with CUDA {built}; this driver supports CUDA {driver}: update the driver"
    major, minor = torch.cuda.get_device_capability(facts.device)
    compiled = [int(arch) for arch in re.findall(r"\d+", library.cuda_archs)]
    # Machine code runs on later chips of the same major version.
    if any(arch // 10 == major and arch % 10 <= minor for arch in compiled):
        return ""
    return f"it was compiled for sm_{library.cuda_archs.replace(',', ', ')}; this GPU has {major}.{minor}"


def why_not_triton(module: str, facts: Facts) -> str:
    """Why the Triton kernels in `module` cannot run: they take CUDA tensors, or CPU tensors in Triton's interpreter.

    The module's own `why_not(facts)` is asked last.
    """
    try:
        kernels = importlib.import_module(module)
    except Exception as error:  # of any kind, by a version of triton that does not fit
        return f"triton does not import ({error})"
    if facts.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it takes CUDA tensors; these are on {facts.device} (TRITON_INTERPRET=1 runs it there, slowly)"
    return kernels.why_not(facts)


def why_not_dot(facts: Facts) -> str:
    """Why a Triton kernel that multiplies matrices cannot run on this dtype and GPU."""
    if facts.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {str(facts.dtype).removeprefix('torch.')}"
    if facts.device.type != "cuda":
        return "Triton's interpreter multiplies bfloat16 wrongly" if facts.dtype == torch.bfloat16 else ""
    major, minor = torch.cuda.get_device_capability(facts.device)
    return "" if major >= 8 else f"it needs compute capability 8.0; this GPU has {major}.{minor}"


def triton_backend(module: str) -> Backend:
    """The Triton backend in `module`, which is imported when it is first needed.

    The module has `why_not(facts)`, `forward(*arguments)` and `backward(*gradients_and_outputs, *arguments, **needs)`.
    """

    def why_not(facts):
        return why_not_triton(module, facts)

    def forward(arguments):
        return importlib.import_module(module).forward(*arguments)

    def backward(*incoming, **needs):
        *incoming, arguments = incoming
        return importlib.import_module(module).backward(*incoming, *arguments, **needs)

    return Backend(why_not, forward, backward)


def vjp(function: Callable[..., Any], gradient: Any, *inputs: Any) -> Any:
    """The gradients of a function's inputs, for the backward of a reference.

    An op's implementation runs below autograd, where only torch.func still differentiates.
    """
    return torch.func.vjp(function, *inputs)[1](gradient)


class NativeProblem:
    """A problem of the native library, with references to the tensors that its addresses point into.

    The references must outlive the native call, so calls go through the methods.
    """

    def __init__(self, problem: Any, *held: Any):
        self.problem, self.held = problem, held

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Runs the native forward."""
        self.problem.forward(*args, **kwargs)

    def backward(self, **kwargs: Any) -> None:
        """Runs the native backward."""
        self.problem.backward(**kwargs)

    def launch(self, entry: str, device: torch.device, **kwargs: Any) -> None:
        """Calls an entry point in CUDA C++, "forward_cuda" or "backward_cuda", on the device's current stream."""
        with on(device):
            getattr(self.problem, entry)(**kwargs, stream=stream(device))


def readable(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The tensor, in the dtype and contiguous, as native code reads it; None for None."""
    return tensor if tensor is None else tensor.to(dtype).contiguous()


def address(tensor: torch.Tensor | None) -> int:
    """The tensor's address for native code; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which a GPU kernel is launched on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launches(
    tensors: Sequence[torch.Tensor | None], programs: int = 1
) -> Iterator[tuple[int, Sequence[torch.Tensor | None]]]:
    """Splits a launch whose second or third axis has `programs` for each entry of the tensors' first axis.

    These axes end at 65,535. Parts have a multiple of 16 entries, which keeps the alignment that Triton compiles for.

    Yields:
        The number of entries, and the tensors.
    """
    first = tensors[0]
    assert first is not None
    most = max(16, _GRID // programs // 16 * 16)
    if len(first) <= most:
        yield len(first), tensors
        return
    for start in range(0, len(first), most):
        yield min(most, len(first) - start), [t if t is None else t[start : start + most] for t in tensors]


def stream(device: torch.device) -> int:
    """The address of the device's current stream; 0 for a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device.

    What is computed during a capture holds values only in a replay; what a graph reads must stay allocated.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class TensorCache:
    """The last results of a function whose last argument is a device, for use in CUDA graphs too.

    What a capture computes is not kept, as its memory holds no values before a replay. What a capture finds is kept for
    ever, as replays read it by its address.

    Args:
        compute: returns tensors; its arguments are hashable.
        size: how many results are kept besides those that graphs read.
    """

    def __init__(self, compute: Callable[..., Any], size: int):
        self.compute, self.size = compute, size
        self._results: dict[tuple[Any, ...], Any] = {}  # the last one was used last
        self._in_graphs: set[tuple[Any, ...]] = set()

    def __call__(self, *arguments: Any) -> Any:
        """compute(*arguments), or its earlier result."""
        capturing = is_capturing(arguments[-1])
        if capturing and arguments in self._results:
            self._in_graphs.add(arguments)
        result = self._results.pop(arguments, None) or self.compute(*arguments)
        if not capturing or arguments in self._in_graphs:
            self._results[arguments] = result
        for old in [old for old in self._results if old not in self._in_graphs][: -self.size]:
            self._results.pop(old, None)  # another thread may have removed it
        return result

    def __len__(self) -> int:
        """How many results are kept."""
        return len(self._results)

    def clear(self) -> None:
        """Forgets the results; no CUDA graph may be replayed after it."""
        self._results.clear()
        self._in_graphs.clear()


def precision() -> str:
    """`input_precision` of `tl.dot` for float32: follows torch.get_float32_matmul_precision()."""
    return devices.float32_precision()
