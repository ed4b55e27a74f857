"""The compiled module: addresses in, results in place. See csrc/inr.h; used by op.py alone."""

from collections.abc import Sequence

cuda_archs: str
max_depth: int

def isa() -> str: ...

class LocalImplicit:
    def __init__(
        self,
        *,
        type: int,
        queries: tuple[int, int, int],
        size: tuple[int, int],
        band: tuple[int, int],
        local_ensemble: bool,
        ensemble_first: bool,
        widths: Sequence[int],
        y: tuple[int, tuple[int, int, int]],
        x: tuple[int, tuple[int, int, int]],
        cell: tuple[int, tuple[int, int, int, int]],
        centre_y: int,
        centre_x: int,
        hoisted: int,
        position_weight: int,
        weights: Sequence[int],
        biases: Sequence[int],
        threads: int,
    ) -> None: ...
    def forward(self, out: int) -> None: ...
    def backward(
        self,
        *,
        grad_out: int,
        hoisted: int,
        position_weight: int,
        weights: Sequence[int],
        biases: Sequence[int],
    ) -> None: ...

class ElementwiseFilter:
    def __init__(
        self,
        *,
        type: int,
        size: tuple[int, int, int, int],
        groups: int,
        out_size: tuple[int, int],
        kernel_size: tuple[int, int],
        dilations: Sequence[int],
        stride: int,
        upscale: int,
        padding: int,
        normalize: int,
        coefficients: tuple[float, float, float],
        x: int,
        kernel: tuple[int, tuple[int, int, int, int]],
        log_window: int,
        threads: int,
    ) -> None: ...
    def forward(self, out: int) -> None: ...
    def backward(self, *, grad_out: int, x: int, kernel: int) -> None: ...

def spectrum_product(
    *,
    type: int,
    size: tuple[int, int, int, int, int],
    x: int,
    weight: int,
    shift: int,
    relu: bool,
    out: int,
    threads: int,
) -> None: ...
def conv3x3(
    *,
    type: int,
    size: tuple[int, int, int],
    x: tuple[tuple[int, int, int], tuple[int, int, int]],
    outputs: int,
    padding: int,
    weight: int,
    bias: int,
    add: int,
    relu: bool,
    out: int,
    threads: int,
) -> None: ...
