"""Runs a job in a process of its own, which may crash, hang or print without end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

from inr_kernels._core.text import printable
from inr_kernels._core.verdicts import Verdict

from .worker import Job

COMMAND = [sys.executable, "-m", "inr_kernels._core.proof.worker"]
_alive: set[subprocess.Popen[bytes]] = set()
_KEPT = 2000  # bytes of the end of its error messages
_RESULT = 1 << 16  # bytes: a pipe holds them, so that a process can write its result before it is read
# A worker requests its backends itself, and starts no proof.
_NOT_PASSED_ON = {"INR_KERNELS_BACKEND", "INR_KERNELS_PROVE"}


def run(job: Job) -> Verdict:
    """The verdict that a process finds, or that it did not end well."""
    found = _result(job)
    kernel, reference = (None if name not in found else tuple(found[name]) for name in ("kernel", "reference"))
    return Verdict(job.op, job.backend, job.dtype, job.form, found["reason"], kernel, reference)


def _result(job) -> dict[str, Any]:
    """What the process of a job writes: "reason" and, if they were measured, "kernel" and "reference"."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        process = subprocess.Popen(
            [*COMMAND, json.dumps(job), str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[writer],
            start_new_session=True,  # with the compilers that it starts, it is one group to end
            env={name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON},
        )
        _alive.add(process)
        tail = _Tail(process.stderr)
        try:
            status: int | None = process.wait(job.limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
            process.wait()
            _alive.discard(process)
        try:
            return json.loads(os.read(reader, _RESULT))
        except (BlockingIOError, ValueError):
            return {"reason": _why_ended(status, job.limit, tail)}
    finally:
        os.close(reader)
        os.close(writer)


def end_all() -> None:
    """Ends the processes of all jobs that run in other threads."""
    for process in [*_alive]:
        _end(process)


def _end(process):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _why_ended(status, limit, tail):
    if status is None:
        return f"hangs: ended after {limit:g} s"
    if status < 0:
        return f"crashes: {signal.Signals(-status).name}"
    lines = tail.text().strip().splitlines() or ["no message"]
    return f"crashes: exit status {status}, {printable(lines[-1])}"


class _Tail:
    """Reads a stream to its end, and keeps the last bytes."""

    def __init__(self, stream):
        self._stream, self._kept = stream, b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        with self._stream:
            while chunk := self._stream.read1(1 << 16):
                self._kept = (self._kept + chunk)[-_KEPT:]

    def text(self) -> str:
        self._thread.join(timeout=1)
        return self._kept.decode(errors="replace")
