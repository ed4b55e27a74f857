"""The memory that pictures take between reading and writing, so that reading ahead stays within `--max-memory`."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from . import pictures
from .pictures import Job


class Budget:
    """Counts the estimated bytes of all pictures that were read and are not written yet.

    The thread that reads asks by `admit` before it decodes, and waits until there is room; the thread that computes
    learns by `wait` that the reader waits, and then finishes pictures. A picture is always admitted if there is no
    other: what it needs alone was checked.

    Args:
        limit: bytes of all that is needed.
        workspace: bytes of it that the network needs once, for one picture or several.
    """

    def __init__(self, limit: float, workspace: float):
        self.limit, self.workspace = limit, workspace
        self._waiting: dict[Job, float] = {}  # decoded, or being decoded
        self._busy: dict[Job, float] = {}  # being computed or written
        self._changed = threading.Condition()
        self._is_full = self._is_closed = False

    def admit(self, job: Job) -> None:
        """Waits until the picture may be decoded, and until what it needs then fits with the pictures that wait.

        Raises:
            RuntimeError: the run ends.
        """
        with self._changed:
            self._waiting.pop(job, None)
            while (self._waiting or self._busy) and not self._has_room(job):
                if self._is_closed:
                    raise RuntimeError("the run ends")
                self._is_full = True
                self._changed.notify_all()
                self._changed.wait()
            self._is_full = False
            self._waiting[job] = job.decoding

    def _has_room(self, job: Job) -> bool:
        decoded = sum(self._waiting.values()) + job.decoding
        largest = max(max(0, other.need - self.workspace - other.decoding) for other in (*self._waiting, job))
        most = max(decoded + sum(self._busy.values()), decoded + largest)
        return self.workspace + most <= self.limit and job.decoding + largest <= pictures.unused_memory()

    def fits(self, group: Sequence[Job]) -> bool:
        """Whether pictures may be computed together now."""
        with self._changed:
            others = {**self._waiting, **self._busy}
            need = self.workspace + sum(job.need - self.workspace for job in group)
            taken = sum(bytes_ for job, bytes_ in others.items() if job not in group)
        return need + taken <= self.limit and need <= pictures.unused_memory()

    def start(self, group: Sequence[Job]) -> None:
        """Notes that pictures are computed from now on."""
        with self._changed:
            for job in group:
                self._waiting.pop(job, None)
                self._busy[job] = job.need - self.workspace

    def remove(self, *jobs: Job) -> None:
        """Notes that pictures were written, or failed."""
        with self._changed:
            for job in jobs:
                self._waiting.pop(job, None)
                self._busy.pop(job, None)
            self._wake()

    def wait(self, reading: Future[Any]) -> bool:
        """Waits until a picture was read; returns False if the reader waits for memory instead."""
        reading.add_done_callback(lambda _: self._notify())
        with self._changed:
            self._changed.wait_for(lambda: reading.done() or self._is_full)
            return reading.done()

    def close(self) -> None:
        """Ends the waiting of the reader, by an error."""
        with self._changed:
            self._is_closed = True
            self._wake()

    def _wake(self) -> None:
        """Lets the reader look again."""
        self._is_full = False
        self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
