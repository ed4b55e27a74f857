"""A made-up GPU that computes on the CPU, an op whose backends are deliberately bad, and fast processes for proofs."""

import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from inr_kernels._core import devices
from inr_kernels._core.dispatch import OPS

from .functional import OP

FOLDER = Path(__file__).parent


class MadeUp(devices.Device):
    """cpu and cpu:1 as two different cards."""

    decides = True
    capturing = False

    @property
    def name(self):
        return "Made-up 5000" if self.torch.index else "Made-up 9000"

    def is_capturing(self):
        return self.capturing

    def workers(self):
        return 2


@contextmanager
def installed():
    """In the block, CPU tensors are on the made-up GPU, and "made_up" is the only op."""
    kinds, found = mock.patch.dict(devices.KINDS, cpu=MadeUp), mock.patch.dict(devices._FOUND, clear=True)
    chosen = mock.patch.object(OP, "_chosen", {})
    with kinds, found, chosen, mock.patch.dict(OPS, {"made_up": OP}, clear=True):
        yield


@contextmanager
def fast_processes():
    """In the block, a proof's processes are forked by one that has imported torch: yields their command."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        command = [sys.executable, "-c", "from made_up.server import serve; serve()", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=FOLDER.parent) as server:
            assert server.stdout.readline() == b"ready\n"
            yield [sys.executable, "-S", "-E", str(FOLDER / "client.py"), address]
            server.kill()
