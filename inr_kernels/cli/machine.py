"""Facts about this machine: its free memory."""

import contextlib
import os
from pathlib import Path


def free_memory() -> int | None:
    """Bytes that this process can still allocate, None if unknown."""
    limits: list[int] = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        limits.append(int(line.split()[1]) << 10)
    with contextlib.suppress(OSError, ValueError):  # the limit of a container; "max" (no limit) raises
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        limits.append(int((group / "memory.max").read_text()) - used)
    if not limits:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)
