"""The compiled module. Tensors are passed as addresses, and results are written in place; only the ops use it.

csrc/inr.h documents the arguments. Strides are in elements.
"""

from collections.abc import Sequence

cuda_archs: str
cuda_version: str  # of nvcc; empty without CUDA
max_depth: int

def isa() -> str: ...
def has_openmp() -> bool: ...
def release_memory() -> None: ...

class Memory:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

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
        texture: bool,
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
    # Only if cuda_archs is not empty: the workspace's size in bytes, and the forward on a stream, with wgmma (compute
    # capability 9.0) or with mma.sync.
    def workspace_cuda(self) -> int: ...
    def forward_cuda(self, wgmma: bool, out: int, workspace: int, stream: int) -> None: ...

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
    # Only if cuda_archs is not empty, as those below of this name.
    def forward_cuda(self, *, log_window: int, out: int, stream: int) -> None: ...
    def backward_cuda(self, *, log_window: int, grad_out: int, x: int, kernel: int, stream: int) -> None: ...

class UnmaskAttention:
    def __init__(
        self,
        *,
        type: int,
        size: tuple[int, int, int],
        scale: float,
        mask_keys: bool,
        feat: int,
        weight: int,
        threads: int,
    ) -> None: ...
    def forward(self, *, out: int, softmax: int) -> None: ...
    def backward(self, *, out: int, softmax: int, grad_out: int, grad_feat: int) -> None: ...

_Axis = tuple[int, int, int, int, int, bool]  # queries, length, kernel, dilation, stride, causal
_Tokens = tuple[int, tuple[int, int, int, int, int]]  # address, strides of batch, depth, height, width, heads

class NeighborhoodAttention:
    def __init__(
        self,
        *,
        type: int,
        batch: int,
        heads: tuple[int, int, int],  # of query, key and value
        dims: tuple[int, int],  # channels of query and key, of value
        z: _Axis,
        y: _Axis,
        x: _Axis,
        scale: float,
        mean_heads: bool,
        query: _Tokens,
        key: _Tokens,
        value: _Tokens,
        bias: int,
        threads: int,
    ) -> None: ...
    def forward(self, *, out: _Tokens, lse: int) -> None: ...
    def backward(
        self,
        *,
        lse: int,
        grad_out: _Tokens,
        grad_lse: int,
        gradients: tuple[_Tokens, _Tokens, _Tokens, int],  # of query, key, value and bias
    ) -> None: ...
    def forward_cuda(self, *, out: _Tokens, lse: int, stream: int) -> None: ...
    def tiles_cuda(self) -> int: ...
    def backward_cuda(
        self,
        *,
        lse: int,
        grad_out: _Tokens,
        grad_lse: int,
        gradients: tuple[_Tokens, _Tokens, _Tokens, int],  # of query, key, value and bias
        delta: int,
        stream: int,
    ) -> None: ...

def spectrum_product(
    *,
    type: int,
    size: tuple[int, int, int, int, int],
    x: int,
    weight: int,
    prepared: int,
    shift: int,
    relu: bool,
    add_input: bool,
    out: int,
    threads: int,
) -> None: ...
def prepare_spectrum_product(
    *, type: int, size: tuple[int, int, int], weight: int, prepared: int, threads: int
) -> int: ...
def conv3x3(
    *,
    type: int,
    size: tuple[int, int, int],
    x: tuple[tuple[int, int, int], tuple[int, int, int]],
    outputs: int,
    padding: int,
    transposed: bool,
    weight: int,
    prepared: int,
    bias: int,
    add: int,
    residual: int,
    relu: bool,
    out: int,
    threads: int,
) -> None: ...
def conv3x3_weight_gradient(
    *,
    type: int,
    size: tuple[int, int, int],
    x: tuple[tuple[int, int, int], tuple[int, int, int]],
    outputs: int,
    padding: int,
    grad: int,
    out: int,
    threads: int,
) -> None: ...
def prepare_conv3x3(*, type: int, size: tuple[int, int], weight: int, prepared: int, threads: int) -> int: ...
def conv2d(
    *,
    type: int,
    size: tuple[int, int, int, int],
    out_size: tuple[int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    padding: int,
    transposed: bool,
    x: int,
    weight: int,
    prepared: int,
    scale: int,
    bias: int,
    add: int,
    relu: bool,
    out: int,
    threads: int,
) -> None: ...
def prepare_conv2d(
    *,
    type: int,
    size: tuple[int, int, int, int],
    out_size: tuple[int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    padding: int,
    transposed: bool,
    weight: int,
    prepared: int,
    threads: int,
) -> int: ...
def fingerprint(*, tensors: list[tuple[int, int]], threads: int) -> int: ...
def mlp(
    *,
    type: int,
    rows: int,
    widths: Sequence[int],
    activation: int,
    eps: float,
    x: int,
    norm_weight: int,
    norm_bias: int,
    weights: Sequence[int],
    biases: Sequence[int],
    add: int,
    out: int,
    threads: int,
) -> None: ...
def pack_signs(*, type: int, count: int, x: int, bits: int, threads: int) -> None: ...
def select_by_signs(*, type: int, count: int, grad: int, bits: int, out: int, threads: int) -> None: ...
def multiply_adds(*, type: int, steps: int, threads: int) -> float: ...
