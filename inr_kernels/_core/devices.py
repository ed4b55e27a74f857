"""The devices that kernels are proven on: what identifies them, and how calls are timed there."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import native

_PACKAGE = Path(__file__).parents[1]
_DRIVER = Path("/proc/driver/nvidia/version")
_MEMORY = 6_000_000_000  # bytes that a check may need on a GPU
_MIN_ROUNDS, _MAX_ROUNDS = 5, 200


class Device:
    """One device of this process. Verdicts hold for devices of one `key()`."""

    decides = False  # whether verdicts choose the default backend there

    def __init__(self, device: torch.device):
        self.torch = device

    @property
    def name(self) -> str:
        """The product's name."""
        raise NotImplementedError

    def details(self) -> dict[str, str]:
        """What else a kernel's correctness and speed depend on, e.g. the driver's version."""
        return {}

    @functools.cached_property
    def key(self) -> str:
        """Name, details, versions of torch and triton, and a hash of the kernels' sources, as one line."""
        facts = self.details() | {"torch": torch.__version__, "triton": version("triton"), "kernels": kernels_hash()}
        return ", ".join([self.name, *(f"{name} {value}" for name, value in facts.items())])

    def workers(self) -> int:
        """How many processes may compile and check kernels at once."""
        return 1

    def is_capturing(self) -> bool:
        """Whether a graph is being captured on the device."""
        return False

    def synchronize(self) -> None:
        """Waits for the device's work."""

    def seconds(self, run: Callable[[], object], budget: float) -> float:
        """The median time of `run()`, after one call that is not counted, over about `budget` seconds."""
        run()
        times = self._times(run, _MIN_ROUNDS)
        rounds = min(_MAX_ROUNDS, int(budget / max(statistics.median(times), 1e-9)))
        return statistics.median(self._times(run, rounds) if rounds > _MIN_ROUNDS else times)

    def _times(self, run: Callable[[], object], rounds: int) -> list[float]:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times


class Processor(Device):
    """This machine's processor."""

    @property
    def name(self) -> str:
        """The processor's name."""
        return processor()

    def details(self) -> dict[str, str]:
        """The instruction set in use."""
        library = native.load()[0]
        return {"instructions": library.isa() if library else "none"}


class Gpu(Device):
    """A GPU that torch.cuda sees."""

    decides = True

    @property
    def name(self) -> str:
        """The GPU's name."""
        return torch.cuda.get_device_name(self.torch)

    def details(self) -> dict[str, str]:
        """The compute capability and the driver's version."""
        major, minor = torch.cuda.get_device_capability(self.torch)
        return {"capability": f"{major}.{minor}", "driver": _driver()}

    def workers(self) -> int:
        """One per two cores and per 6 GB of the GPU's memory, at most 8."""
        memory = torch.cuda.get_device_properties(self.torch).total_memory
        return max(1, min((os.cpu_count() or 1) // 2, memory // _MEMORY, 8))

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def synchronize(self) -> None:
        """Waits for the GPU; raises the error of a kernel that failed."""
        torch.cuda.synchronize(self.torch)

    def _times(self, run: Callable[[], object], rounds: int) -> list[float]:
        """By CUDA events. All rounds are enqueued before the first is waited for, which hides the launch overhead."""
        self.synchronize()
        events = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


KINDS: dict[str, type[Device]] = {"cpu": Processor, "cuda": Gpu}  # by torch's type of a device
_FOUND: dict[torch.device, Device] = {}


def find(device: torch.device) -> Device | None:
    """The device that a tensor is on; None where kernels are not proven."""
    found = _FOUND.get(device)
    if found is None and (kind := KINDS.get(device.type)):
        found = _FOUND[device] = kind(device)
    return found


def decide(device: torch.device) -> bool:
    """Whether verdicts choose the default backend for tensors on this device."""
    kind = KINDS.get(device.type)
    return kind is not None and kind.decides


def gpus() -> list[Device]:
    """One GPU of each kind that torch sees."""
    found: list[Device] = [Gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return list({gpu.key: gpu for gpu in reversed(found)}.values())[::-1]


def processor() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


@functools.cache
def kernels_hash() -> str:
    """A hash of the compiled module, the ops' kernels and their launches, and of what a proof of them covers."""
    files = [*_PACKAGE.glob("_C*.so"), *_PACKAGE.glob("_C*.pyd"), _PACKAGE / "_core/backends.py"]
    for name in ("op", "triton_kernels", "arguments", "problems"):
        files += [*_PACKAGE.glob(f"*/{name}.py"), *_PACKAGE.glob(f"*/{name}/*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(str(file.relative_to(_PACKAGE)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    try:
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", _DRIVER.read_text())
    except OSError:
        found = None
    return found[1] if found else ".".join(map(str, cuda_of_driver() or ["unknown"]))


@functools.cache
def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports; None where torch cannot say."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)  # of builds with CUDA
    found = ask() if ask else 0
    return (found // 1000, found % 1000 // 10) if found else None


def float32_precision() -> str:
    """Returns "ieee", or "tf32" where torch may round the factors of float32 matrix products on a GPU."""
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # it was set by torch's newer function, after which the older one cannot be asked
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
