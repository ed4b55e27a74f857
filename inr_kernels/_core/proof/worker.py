"""Proves one backend of an op, for one dtype and form, in a process of its own: `python -m … JOB DESCRIPTOR`.

An illegal access makes CUDA unusable in its process, and a kernel that hangs can only be killed with it. JOB is a `Job`
as JSON; the result is written to the file descriptor as JSON: the fields of `Verdict` that are not in the job.
"""

import contextlib
import faulthandler
import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from inr_kernels._core import devices
from inr_kernels._core.text import printable

from .poison import poisoned_memory
from .problems import forms, known_op

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
OUT_OF_MEMORY = "out of memory"
_LONGEST = 500  # characters of an error: a pipe holds them without a reader
BUDGET, QUICK_BUDGET = 0.3, 0.05  # seconds of a figure


class Job(NamedTuple):
    """What one process proves.

    Args:
        op, backend, dtype, form: as in `Verdict`.
        device: torch's name of it, e.g. "cuda:0".
        quick: whether to measure less long.
        limit: seconds after which the process ends, also if its parent no longer exists.
        stage: "check" the results, "time" the kernel, or do "both".
    """

    op: str
    backend: str
    dtype: str
    form: str
    device: str
    quick: bool
    limit: float
    stage: str = "both"


def main(argv: list[str]) -> None:
    """Runs a job."""
    job, descriptor = Job(*json.loads(argv[0])), int(argv[1])
    faulthandler.enable()
    signal.setitimer(signal.ITIMER_REAL, job.limit + 10)
    try:
        found = prove_here(job)
    except torch.OutOfMemoryError:
        found = {"reason": OUT_OF_MEMORY}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        found = {"reason": f"raises {type(error).__name__}: {printable(lines[0])[:_LONGEST]}"}
    os.write(descriptor, json.dumps(found).encode())
    os._exit(0)  # a CUDA context with an error may hang while it is freed


def prove_here(job: Job) -> dict[str, Any]:
    """The result of a job: "reason", and the times "kernel" and "reference" where the backend is right."""
    op, at = known_op(job.op), torch.device(job.device)
    device = devices.find(at)
    assert device is not None  # a job is made for a device that was found
    if at.type == "cuda":
        torch.cuda.set_device(at)
    torch.set_float32_matmul_precision("high" if job.dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = job.dtype == "tf32"
    _, problems = forms(op, at, large=device.decides)[job.form]
    torch.manual_seed(0)
    with poisoned_memory(), _deterministic_convolutions():
        for problem in problems if job.stage != "time" else []:
            if reason := why_wrong(Inputs(problem.function or op.function, *problem.build(at)), job, device):
                return {"reason": f"{reason} ({problem.name})"}
    if job.stage == "check":
        return {"reason": ""}
    typical = Inputs(problems[0].function or op.function, *problems[0].build(at)).cast(DTYPES[job.dtype])
    budget = QUICK_BUDGET if job.quick else BUDGET
    kernel, reference = times(typical, [job.backend, "reference"], device, budget)
    return {"reason": "", "kernel": kernel, "reference": reference}


@contextlib.contextmanager
def _deterministic_convolutions():
    """In the block, cuDNN's convolutions, which an op may call beside its kernels, return the same bits in each run."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


class Inputs(NamedTuple):
    """A function, and the arguments and options of a problem."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def is_exact(self) -> bool:
        """Whether the result is known to the last digit of float64: no input, e.g. a coordinate, is float32."""
        leaves = pytree.tree_leaves((self.arguments, self.options))
        return not any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 for leaf in leaves)

    def cast(self, dtype: torch.dtype, rounded: torch.dtype = torch.float64) -> "Call":
        """The call in a dtype, with inputs that are first rounded to another."""
        return Call(self, dtype, rounded)


class Call:
    """A call of a problem in one dtype, whose inputs are first rounded to another."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype, rounded: torch.dtype):
        self.function, self.rounded = inputs.function, rounded
        self.leaves: list[torch.Tensor] = []
        self.given: list[torch.Tensor] = []  # the weights of the outputs, drawn by the first run

        def cast(value):
            if not (isinstance(value, torch.Tensor) and value.dtype == torch.float64):
                return value
            self.leaves.append(value.to(rounded).to(dtype, copy=True).requires_grad_())
            return self.leaves[-1]

        self.arguments, self.options = pytree.tree_map(cast, (inputs.arguments, inputs.options))

    def forward(self, backend: str) -> list[torch.Tensor]:
        """The outputs."""
        out = self.function(*self.arguments, **self.options, backend=backend)
        return list(out) if isinstance(out, (tuple, list)) else [out]

    def run(self, backend: str) -> list[torch.Tensor]:
        """The outputs, and the gradients of their sums weighted by fixed random numbers."""
        outputs = self.forward(backend)
        return [*(t.detach() for t in outputs), *self.gradients(outputs)]

    def gradients(self, outputs: list[torch.Tensor], retain_graph: bool = False) -> tuple[torch.Tensor, ...]:
        """The gradients of the sums of `forward`'s outputs weighted by fixed random numbers."""
        if not self.given:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            for t in outputs:
                drawn = torch.randn(t.shape, dtype=torch.float64, device=t.device, generator=generator)
                self.given.append(drawn.to(self.rounded).to(t.dtype))
        options = {"retain_graph": retain_graph, "allow_unused": True, "materialize_grads": True}
        return torch.autograd.grad(outputs, self.leaves, self.given, **options)


def why_wrong(inputs: Inputs, job: Job, device: devices.Device) -> str:
    """Why a backend's results on one problem are wrong, "" if they are right.

    The error against float64 must be at most twice that of plain PyTorch in the same dtype, plus a few roundings, in
    the largest element and in relative norm; and two runs must return the same bits.
    """
    dtype = DTYPES[job.dtype]
    call = inputs.cast(dtype)
    first, second = call.run(job.backend), call.run(job.backend)
    device.synchronize()
    eager, truth = call.run("reference"), inputs.cast(torch.float64, dtype).run("reference")
    outputs = len(truth) - len(call.leaves)
    for i, (result, again, other, exact) in enumerate(zip(first, second, eager, truth, strict=True)):
        name = f"output {i}" if i < outputs else f"gradient {i - outputs}"
        if result.shape != exact.shape or result.dtype != other.dtype:
            return f"wrong: {name} is {result.dtype} {list(result.shape)}, not {other.dtype} {list(exact.shape)}"
        few = _few_roundings(result.dtype, job.dtype, i < outputs, inputs.is_exact())
        for norm, least in ((_largest, 1.0), (_norm, math.sqrt(exact.numel()))):
            scale = max(norm(exact), least)
            error, allowed = (norm(t.double() - exact) / scale for t in (result, other))
            allowed = 2 * allowed + few
            if not error <= allowed:  # NaN, too
                return f"wrong: {name} has an error of {error:.1e}, allowed {allowed:.1e}"
        if not torch.equal(result, again):
            return f"wrong: {name} differs between two runs"
    return ""


def _largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _norm(tensor):
    return torch.linalg.vector_norm(tensor).item()


def _few_roundings(dtype, name, is_output, is_exact):
    """The error that is allowed where plain PyTorch has none."""
    if dtype == torch.float64 and is_exact:
        return 1e-14 if is_output else 1e-13
    few = 1e-6 if is_output else 1e-5
    return few + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 2.0**-10 if name == "tf32" else 0.0)


def times(call: Call, backends: Sequence[str], device: devices.Device, budget: float) -> list[tuple[float, float]]:
    """For each backend the seconds of the forward, and of the backward.

    The smaller of two medians: what else runs on the machine should disturb one of them only.
    """

    def forward(backend):
        with torch.no_grad():
            call.forward(backend)

    def backward(backend):
        return functools.partial(call.gradients, call.forward(backend), retain_graph=True)

    runs = [*(functools.partial(forward, name) for name in backends), *map(backward, backends)]
    rounds = [[device.seconds(run, budget / 2) for run in runs] for _ in range(2)]
    best = [min(medians) for medians in zip(*rounds, strict=True)]
    return list(zip(best[: len(backends)], best[len(backends) :], strict=True))


if __name__ == "__main__":
    main(sys.argv[1:])
