"""The verdicts of `inr-kernels prove`: which kernels are right, and faster than plain PyTorch, on which device.

They are stored in one JSON file in the user's cache directory, by `Device.key`: another driver, torch or build of the
kernels has none. A process reads them once per device, at the first call that needs them, but for `prove` itself.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import torch
from filelock import FileLock, Timeout

from . import devices
from .devices import Device
from .files import replace_file

if TYPE_CHECKING:
    from .dispatch import Facts

_NAME, _FORMAT = "verdicts.json", 1


@dataclass(frozen=True)
class Verdict:
    """What a proof found out about a backend of an op, for one dtype and one form of the call.

    Args:
        op, backend: their names.
        dtype: "float64", "float32", "tf32" (float32 whose matrix products may round, see `dtype_name`), "bfloat16" or
            "float16".
        form: what specialises the kernel, see `Facts.form`.
        reason: why the backend is off, forward and backward; "" if its results are right.
        kernel: median seconds of its forward and of its backward; None if it was not timed.
        reference: the same of plain PyTorch.
    """

    op: str
    backend: str
    dtype: str
    form: str
    reason: str = ""
    kernel: tuple[float, float] | None = None
    reference: tuple[float, float] | None = None

    @property
    def call(self) -> tuple[str, str, str]:
        """The calls that it covers: op, dtype and form."""
        return self.op, self.dtype, self.form

    @property
    def speedups(self) -> tuple[float, float] | None:
        """How many times faster than plain PyTorch the forward is, and the backward."""
        if self.kernel is None or self.reference is None:
            return None
        forward, backward = (theirs / ours for theirs, ours in zip(self.reference, self.kernel, strict=True))
        return forward, backward

    def is_on(self, backward: bool = False) -> bool:
        """Whether the forward, or the backward, is right and faster than plain PyTorch.

        A backward is on only with its forward: it was proven on what that saves.
        """
        if self.reason:
            return False
        return self.speedups is None or (self.speedups[0] > 1 and (not backward or self.speedups[1] > 1))

    @property
    def state(self) -> str:
        """In words: "on", or what is off and why."""
        if self.reason:
            return f"off: {self.reason}"
        forward, backward = self.is_on(), self.is_on(backward=True)
        if forward == backward:
            return "on" if forward else "off: not faster"
        return "forward on; backward off: not faster"

    def __str__(self) -> str:
        return self.state + (f" ({self.speedups[0]:.1f}×, {self.speedups[1]:.1f}×)" if self.speedups else "")


Table = dict[tuple[str, str, str], list[Verdict]]  # by `Verdict.call`
_tables: dict[torch.device, Table] = {}
_unsaved: dict[str, list[Verdict]] = {}  # where the file cannot be written
_generation = 0


def generation() -> int:
    """How often this process's verdicts have changed."""
    return _generation


def dtype_name(facts: "Facts") -> str:
    """The dtype of a call in a verdict: "tf32" for float32 where verdicts decide and matrix products may round."""
    if facts.dtype == torch.float32 and devices.decide(facts.device):
        return "tf32" if devices.float32_precision() == "tf32" else "float32"
    return str(facts.dtype).removeprefix("torch.")


def of_call(op: str, facts: "Facts") -> list[Verdict]:
    """The verdicts that cover a call, [] where none was made. During the capture of a graph only memory is read."""
    device = devices.find(facts.device)
    return table(device).get((op, dtype_name(facts), facts.form), []) if device else []


def table(device: Device) -> Table:
    """The verdicts on a device, as this process has read them."""
    if device.torch not in _tables:
        if device.is_capturing():
            return {}
        calls: Table = {}
        for verdict in stored().get(device.key, []):
            calls.setdefault(verdict.call, []).append(verdict)
        _tables[device.torch] = calls
    return _tables[device.torch]


def fastest(op: str, facts: "Facts", backward: bool = False) -> list[str]:
    """The backends that are on for a call's forward, the fastest first; for its backward at most the first of them.

    The backward reads what the forward saves, and a proof runs each backend with itself.
    """
    found = [verdict for verdict in of_call(op, facts) if verdict.is_on()]
    found.sort(key=lambda v: v.kernel[0] if v.kernel else 0.0)
    return [v.backend for v in found[: 1 if backward else None] if v.is_on(backward)]


def file() -> Path | None:
    """The file of the verdicts; None where the user has no home directory."""
    try:
        path = platformdirs.user_cache_path("inr-kernels", appauthor=False) / _NAME
    except RuntimeError:  # of a user without an entry in the list of users
        return None
    return path if path.is_absolute() else None


def stored() -> dict[str, list[Verdict]]:
    """All verdicts by `Device.key`: those of the file, and those of this process that could not be saved."""
    found = _read() or {}
    return {key: _merged(found.get(key, []), _unsaved.get(key, [])) for key in [*found, *_unsaved]}


def _read():
    """The verdicts of the file; None, with a warning, where it is not one that `save` wrote."""
    path = file()
    try:
        return {} if path is None else _parsed(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except OSError as error:
        reason = f"it cannot be read: {error.strerror}"
    except _NoVerdicts as error:
        reason = str(error)
    except (ValueError, RecursionError):
        reason = "it is not JSON"
    warnings.warn(f"{path} holds no verdicts of inr-kernels and is ignored: {reason}", stacklevel=2)
    return None


class _NoVerdicts(Exception):
    """A file's JSON is not what `save` writes; the message says why."""


def _parsed(data):
    found = data.get("format") if isinstance(data, dict) else None
    if found != _FORMAT:
        raise _NoVerdicts("it has no format" if found is None else f"its format is {found!r}, not {_FORMAT}")
    try:
        return {key: [_verdict(**entry) for entry in entries] for key, entries in data["verdicts"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise _NoVerdicts("an entry is not a verdict") from None


def _verdict(kernel, reference, **names):
    if not all(isinstance(value, str) for value in names.values()):
        raise TypeError("a name or reason is no text")
    if not all(seconds > 0 for pair in (kernel, reference) for seconds in pair or ()):
        raise ValueError("a time is not positive")
    times = [None if pair is None else (float(pair[0]), float(pair[1])) for pair in (kernel, reference)]
    return Verdict(**names, kernel=times[0], reference=times[1])


def _merged(old, new):
    """Both; a new verdict replaces the old one on the same backend and call."""
    return list({(*verdict.call, verdict.backend): verdict for verdict in (*old, *new)}.values())


def save(key: str, new: Iterable[Verdict]) -> None:
    """Adds verdicts to those of the device with this key; they replace older ones of the same backends and calls.

    Where the file cannot be written, it warns, and this process keeps them in memory.
    """
    try:
        _change(lambda found: found | {key: _merged(found.get(key, []), new)})
    except OSError as error:
        if not _unsaved:
            warnings.warn(f"verdicts cannot be saved and hold for this process only ({error})", stacklevel=2)
        _unsaved[key] = _merged(_unsaved.get(key, []), new)


def forget(drop: Callable[[str, Verdict], bool]) -> int:
    """Deletes the verdicts for which `drop(key, verdict)` is true; returns their number.

    Raises:
        OSError: the file cannot be written.
    """
    count = 0

    def change(found):
        nonlocal count
        kept = {key: [v for v in verdicts if not drop(key, v)] for key, verdicts in found.items()}
        count = sum(map(len, found.values())) - sum(map(len, kept.values()))
        return {key: verdicts for key, verdicts in kept.items() if verdicts}

    _unsaved.clear()
    _change(change)
    reread()
    return count


def _change(change):
    path = _folder() / _NAME
    with FileLock(path.with_suffix(".lock")):
        found = _read()
        if found is None:  # kept: it may be someone's
            os.replace(path, path.with_suffix(".invalid"))
        data = {key: [asdict(verdict) for verdict in verdicts] for key, verdicts in change(found or {}).items()}
        text = json.dumps({"format": _FORMAT, "verdicts": data}, indent=1)
        replace_file(path, text.encode())


def reread() -> None:
    """Makes the next call of each op read the verdicts again; CUDA graphs of networks are captured again."""
    global _generation
    _tables.clear()
    _generation += 1


@contextlib.contextmanager
def proving(device: Device, on_wait: Callable[[], object]) -> Iterator[None]:
    """Holds a lock in the block, as two proofs on one device would disturb each other's times.

    on_wait: called once if another process holds it.
    """
    try:
        lock = _lock(device)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            held = lock.acquire()
    except OSError:  # there is no file that it could be: the process proves without
        yield
        return
    with held:
        yield


def is_proving(device: Device) -> bool:
    """Whether a process is proving on the device now."""
    try:
        with _lock(device).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _lock(device):
    name = hashlib.sha256(device.key.encode()).hexdigest()[:16]
    return FileLock(_folder() / f"{name}.lock")


def _folder():
    """The folder of the verdicts; creates it."""
    path = file()
    if path is None:
        raise FileNotFoundError("the user has no home directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def note(op: str, backend: str, facts: "Facts", form: str) -> str:
    """What `explain` adds on a backend that can run a call: its verdict, or that there is none on a GPU.

    form: of the call; "" for a summary of all forms.
    """
    device = devices.find(facts.device)
    if device is None or backend == "reference":
        return ""
    found = [v for made in table(device).values() for v in made]
    found = [v for v in found if (v.op, v.dtype, v.backend) == (op, dtype_name(facts), backend)]
    if form:
        found = [v for v in found if v.form == form]
    if not found:
        return "; not proven: run `inr-kernels prove`" if devices.decide(facts.device) else ""
    if form:
        return f"; proof: {found[0]}"
    forward, backward = (sum(v.is_on(backward) for v in found) for backward in (False, True))
    if forward == backward:
        return f"; proof: on in {forward} of {len(found)} forms"
    return f"; proof: forward on in {forward} of {len(found)} forms, backward in {backward}"
