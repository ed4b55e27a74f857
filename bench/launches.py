"""`Launch`: the bytes, FLOPs, programs and loop trips of one kernel launch; `launches()`: those of every op.

Each `bench_<op>.py` describes its own launches on the shape of the paper in a function `launches`.
"""

import functools
from dataclasses import dataclass

from . import op_modules


@dataclass(frozen=True)
class Native:
    """What a CUDA kernel's launch adds to its machine code: a name to display, and the size of a block.

    Args:
        label: the name to display.
        warps: warps of a block.
        shared: bytes of dynamic shared memory of a block.
        loop: which loop `Launch.trips` counts: "loop", the longest, or "inner", that of the products alone.
    """

    label: str
    warps: int
    shared: int
    loop: str = "loop"


@dataclass(frozen=True)
class Launch:
    """The work of one kernel launch.

    Args:
        op, kernel, mode, dtype, nth: select one ahead-of-time compilation of tests/support/compile_triton.py: the
            `nth` of those with the other four.
        case: the launch in words.
        programs: number of programs (thread blocks) that do work.
        trips: iterations of the main loop, averaged over the programs.
        bytes: bytes to read and write, every input and output once.
        flops: FLOPs that the matrix products need, however the kernel computes them.
        unit: type of the products' inputs: "bf16", "tf32" or "fp32".
        native: set for a CUDA kernel; `kernel` is then a part of its mangled name.
    """

    op: str
    kernel: str
    mode: str
    dtype: str
    case: str
    programs: int
    trips: float
    bytes: float
    flops: float
    unit: str = "bf16"
    nth: int = 0
    native: Native | None = None

    @property
    def name(self) -> str:
        """The name to display."""
        return self.native.label if self.native else self.kernel


@functools.cache
def launches() -> tuple[Launch, ...]:
    """Returns the launches of all ops."""
    return tuple(launch for module in op_modules().values() for launch in module.launches())
