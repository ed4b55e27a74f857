"""Proves kernels on the device that they will run on: `prove`, and what is proven (`plan`).

Each backend of an op is proven for each dtype and form (`Facts.form`) in a process of its own, see `worker`.
"""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from inr_kernels._core import devices, verdicts
from inr_kernels._core.checks import require
from inr_kernels._core.devices import Device
from inr_kernels._core.dispatch import OPS, Op
from inr_kernels._core.verdicts import Verdict

from . import processes
from .problems import forms, known_op
from .worker import DTYPES, OUT_OF_MEMORY, Job

VARIABLE = "INR_KERNELS_PROVE"
LIMIT = 600.0  # seconds of a job, compilation included
_CHECK, _TIME = 40, 6  # seconds of a job, about: to estimate how long a proof takes
_background: list[subprocess.Popen[bytes]] = []


def prove(
    op: str | Callable[..., Any] | Sequence[str] | None = None,
    *,
    dtype: str | Sequence[str] | None = None,
    device: int | str | torch.device | None = None,
    quick: bool = False,
    missing: bool = False,
    quiet: bool | None = None,
) -> list[Verdict]:
    """Checks every kernel on this machine's GPU, and turns on those that are right and faster than plain PyTorch.

    Each op x backend x dtype x form of the call runs in a process of its own, forward and backward: against float64,
    with memory full of NaN, twice for the same bits, and then against the time of plain PyTorch. A crash, a hang, a
    lack of memory, a wrong number or a slow kernel turns off that kernel for such calls, and the others go on.

    The verdicts are kept in the user's cache directory, for this device, driver, torch, triton and these kernels, as
    soon as each is found. They decide which backend is the default on a GPU, in new processes and in this one from
    now on. On a CPU they are only shown: there the C++ kernels are the default without a proof.

    Args:
        op: the name or the function of an op, or several names; None: all.
        dtype: "float32", "tf32" (float32 where torch.get_float32_matmul_precision() is not "highest"), "bfloat16",
            "float16" or "float64", or several; None: all.
        device: a GPU's number, a device or its name, or "cpu"; None: one GPU of each model.
        quick: only the form of each op that networks use most, measured less long.
        missing: only what has no verdict yet, e.g. after an interruption.
        quiet: whether to show no progress bar; None: only on a terminal.

    Returns:
        The verdicts, in the order in which they were found.

    Raises:
        ValueError: an op, dtype or device that does not exist; the message names it.
        RuntimeError: device is None and torch sees no GPU.

    Example:
        >>> import inr_kernels
        >>> verdicts = inr_kernels.prove("conv3x3", dtype="float32", device="cpu", quiet=True)
        >>> [(verdict.op, verdict.backend, verdict.form) for verdict in verdicts]
        [('conv3x3', 'cpu', 'any')]
    """
    ops, names = _ops(op), _dtypes(dtype)
    made: list[Verdict] = []
    try:
        for found in select(device):
            with verdicts.proving(found, lambda: _say("waits for another process that proves", quiet)):
                jobs = plan(found, ops, names, quick=quick)
                if missing:
                    kept = {(*v.call, v.backend) for v in verdicts.stored().get(found.key, [])}
                    jobs = [job for job in jobs if (job.op, job.dtype, job.form, job.backend) not in kept]
                for verdict in _prove(found, jobs, quiet):
                    verdicts.save(found.key, [verdict])
                    made.append(verdict)
    finally:  # what was found before an interrupt holds, too
        verdicts.reread()
    return made


def _prove(device: Device, jobs: list[Job], quiet: bool | None) -> Iterator[Verdict]:
    """The verdicts of the jobs, each as soon as it is found.

    Where several processes fit, those of an op are checked at once, as most of that time compiles kernels, and then
    timed one after the other.
    """
    hidden = quiet if quiet is not None else None if sys.stderr is not None else True  # None: unless on a terminal
    workers = device.workers()
    pool = ThreadPoolExecutor(workers)
    try:
        with tqdm(total=len(jobs), desc=device.name, unit="kernel", disable=hidden, dynamic_ncols=True) as bar:

            def run(job: Job) -> Verdict:
                bar.set_postfix_str(f"{job.op} {job.backend} {job.dtype}, {job.form}")
                found = processes.run(job)
                bar.update(1.0 if job.stage == "both" else 0.5)
                return found

            if workers == 1:
                yield from map(run, jobs)
                return
            for _, batch in itertools.groupby(jobs, lambda job: job.op):
                checks = [job._replace(stage="check") for job in batch]
                for job, found in zip(checks, list(pool.map(run, checks)), strict=True):
                    if found.reason == OUT_OF_MEMORY:  # the others may have held it
                        yield run(job._replace(stage="both"))
                    elif found.reason:
                        bar.update(0.5)
                        yield found
                    else:
                        yield run(job._replace(stage="time"))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        processes.end_all()
        pool.shutdown()


def plan(device: Device, ops: Iterable[Op], dtypes: Iterable[str], *, quick: bool = False) -> list[Job]:
    """The jobs on a device: every backend that can run there, for each dtype and form of the ops."""
    jobs = []
    for op in ops:
        shapes = forms(op, device.torch, large=device.decides)
        for form in list(shapes)[: 1 if quick else None]:
            for dtype in dtypes:
                if dtype == "tf32" and not device.decides:
                    continue
                facts = dataclasses.replace(shapes[form][0], dtype=DTYPES[dtype])
                jobs += [
                    Job(op.name, name, dtype, form, str(device.torch), quick, LIMIT)
                    for name, backend in op.backends.items()
                    if _is_proven(op, name, device) and not _why_not(backend, facts)
                ]
    return jobs


def _is_proven(op, name, device):
    """Whether a backend can become a default on the device."""
    interpreted = name == "triton" and device.torch.type == "cpu"
    return op.is_provable(name) and not interpreted


def _why_not(backend, facts):
    try:
        return backend.why_not(facts)
    except Exception:  # e.g. at an import; the job's process reports it
        return ""


def _ops(op):
    if op is None:
        return list(OPS.values())
    if callable(op):
        found = next((known for known in OPS.values() if known.function is op), None)
        return [found or known_op(getattr(op, "__name__", op))]
    return [known_op(name) for name in ([op] if isinstance(op, str) else op)]


def _dtypes(dtype):
    names = list(DTYPES) if dtype is None else [dtype] if isinstance(dtype, str) else list(dtype)
    for name in names:
        require(name in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", repr(name))
    return names


def select(device: int | str | torch.device | None) -> list[Device]:
    """The devices that `prove` proves on; raises as it does."""
    if device is None:
        gpus = devices.gpus()
        if not gpus:
            raise RuntimeError("torch sees no GPU; device='cpu' proves the C++ kernels of this processor")
        return gpus
    count = torch.cuda.device_count()
    rule = "be 'cpu' or a GPU that torch sees" + (f", 0 to {count - 1}" if count else "; it sees none")
    try:
        at = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        require(False, "device", rule, repr(device))
        raise
    if at.type == "cuda" and at.index is None:
        at = torch.device("cuda", 0)
    found = devices.find(at) if at.type != "cuda" or at.index < count else None
    require(found is not None, "device", rule, repr(device))
    return [found] if found else []


def _say(message, quiet):
    if not quiet and sys.stderr is not None:
        print(f"inr-kernels: {message}", file=sys.stderr)


def advice(op: str, device: Device) -> str:
    """The warning that a GPU's kernels are not proven; with INR_KERNELS_PROVE=auto it starts the proof, too."""
    jobs = plan(device, OPS.values(), [name for name in DTYPES if name != "float64"])
    seconds = len(jobs) * (_CHECK / device.workers() + _TIME)
    minutes = f"about {math.ceil(seconds / 60)} minutes"
    runs = f"{op} runs on plain PyTorch: its kernels are not proven on {device.name}"
    if os.environ.get(VARIABLE) != "auto":
        return f"{runs}. Run `inr-kernels prove` ({minutes}) to turn on the kernels for {device.name}"
    if not _background and not verdicts.is_proving(device):
        _background.append(_start_in_background(device))
    return f"{runs}. They are proven in the background ({VARIABLE}=auto, {minutes}), for the processes after this one"


def _start_in_background(device):
    """Starts `inr-kernels prove` on the device, which goes on when this process ends."""
    number = "cpu" if device.torch.index is None else str(device.torch.index)
    command = [sys.executable, "-m", "inr_kernels", "prove", "--missing", "--device", number]
    nothing = subprocess.DEVNULL
    environment = os.environ | {VARIABLE: ""}
    return subprocess.Popen(
        command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True, env=environment
    )
