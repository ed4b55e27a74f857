"""neighborhood_attention against dense attention on the same tokens, and against NATTEN where it is installed.

Eager is `scaled_dot_product_attention` of every pixel with every pixel: the cost of these tokens without neighborhoods.

The minimum memory traffic: query, key, value and output once, 2 KB per token of 8 heads x 32 in half precision;
backward: these, the gradients of all four, the log-sum-exp and the like.
"""

import functools
import importlib.util
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import inr_kernels

from .conftest import DEVICE, random_leaf
from .launches import Launch


class Shape(NamedTuple):
    """Shape of the tokens [B, H, W, heads, dim], and the neighborhood."""

    batch: int
    size: tuple[int, int]
    heads: int
    dim: int
    kernel_size: int
    dilation: int

    def __str__(self):
        height, width = self.size
        return f"{self.batch} x {height} x {width}, {self.heads} heads x {self.dim}, K {self.kernel_size}"


SMOKE = Shape(1, (6, 7), 2, 4, 3, 2)
SHAPES = {
    "cpu": [Shape(1, (64, 64), 8, 32, 7, 1), Shape(1, (64, 64), 8, 32, 7, 9), Shape(4, (28, 28), 4, 32, 7, 1)],
    "cuda": [Shape(1, (64, 64), 8, 32, 7, 1), Shape(16, (64, 64), 8, 32, 7, 1), Shape(16, (64, 64), 8, 32, 7, 9)],
}[DEVICE]
IMPLEMENTATIONS = ["eager", "ours", "eager bf16", "ours bf16"]
IMPLEMENTATIONS += ["compile", "compile bf16"] if DEVICE == "cuda" else []
IMPLEMENTATIONS += ["natten", "natten bf16"] if importlib.util.find_spec("natten") else []


def dense(qkv, kernel_size, dilation):
    """Attends from every pixel to every pixel."""
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in qkv.unbind(3))
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(qkv.shape[:3] + qkv.shape[4:])


@functools.cache
def compiled_dense():
    return torch.compile(dense)


def compiled(qkv, kernel_size, dilation):
    return compiled_dense()(qkv, kernel_size, dilation)


def ours(qkv, kernel_size, dilation):
    return inr_kernels.neighborhood_attention_2d_packed(qkv, kernel_size, dilation=dilation)


def natten(qkv, kernel_size, dilation):
    """Attends with NATTEN, which selects one of its backends."""
    from natten import na2d

    return na2d(*qkv.unbind(3), kernel_size=kernel_size, dilation=dilation)


RUNS = {"eager": dense, "compile": compiled, "ours": ours, "natten": natten}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape}, dilation {shape.dilation}")
def bench_attention(measure, smoke, shape, gradients, implementation):
    shape = SMOKE if smoke else shape
    batch, size, heads, dim, kernel_size, dilation = shape
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    qkv = torch.randn(batch, *size, 3, heads, dim, device=DEVICE).to(dtype).requires_grad_(gradients)
    grad = torch.randn(batch, *size, heads, dim, device=DEVICE).to(dtype)
    run = RUNS[implementation.removesuffix(" bf16")]

    def step():
        out = run(qkv, kernel_size, dilation)
        if gradients:
            torch.autograd.grad(out, qkv, grad)

    measure(
        step,
        op="neighborhood_attention",
        case=f"{'forward+backward' if gradients else 'forward'}, {shape}, dilation {dilation}",
        implementation=implementation,
        dtype=dtype,
        bytes=(12 if gradients else 4) * grad.numel() * grad.element_size(),
        small=batch == 1,
    )


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name.split()[0] in ("ours", "natten")])
def bench_module(measure, smoke, implementation):
    """Measures module against module, with both projections, on the first shape."""
    shape = SMOKE if smoke else SHAPES[0]
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    if implementation.startswith("natten"):
        from natten import NeighborhoodAttention2D
    else:
        from inr_kernels import NeighborhoodAttention2D
    channels = shape.heads * shape.dim
    layer = NeighborhoodAttention2D(channels, shape.heads, shape.kernel_size, dilation=shape.dilation)
    layer.to(DEVICE, dtype)
    x = torch.randn(shape.batch, *shape.size, channels, device=DEVICE).to(dtype)
    with torch.no_grad():
        measure(
            lambda: layer(x),
            op="neighborhood_attention",
            case=f"module, {shape}",
            implementation=implementation,
            dtype=dtype,
            bytes=10 * x.numel() * x.element_size(),  # input, qkv, attended values written and read, output
            small=shape.batch == 1,
        )


def first_calls(small):
    """Yields IN²'s attention: packed, with a bias."""
    size, heads, dim, kernel = ((7, 19), 2, 8, 3) if small else ((64, 64), 8, 32, 7)
    qkv, rpb = random_leaf(1, *size, 3, heads, dim), random_leaf(heads, 2 * kernel - 1, 2 * kernel - 1)
    yield functools.partial(inr_kernels.neighborhood_attention_2d_packed, qkv, kernel, rpb=rpb), [qkv, rpb]


def launches():
    """Yields IN²'s attention: sixteen maps of 64², 8 heads x 32, K 7.

    A tile of 4 x 8 queries reads 10 rows of 14 columns: one block of 16 columns per row.
    """
    batch, pixels, heads, dim, kernel = 16, 64 * 64, 8, 32, 7
    pairs, plane = batch * pixels * heads * kernel**2, 2 * batch * pixels * heads * dim
    numbers = 4 * batch * pixels * heads  # the log-sum-exp and the like, float32
    common = {"op": "neighborhood_attention", "mode": "dim 32", "dtype": "bfloat16", "case": "16 x 64², 8 x 32, K 7"}
    common |= {"programs": batch * pixels // 32 * heads}
    product = 2 * pairs * dim
    yield Launch(kernel="attend", trips=10, bytes=4 * plane + numbers, flops=2 * product, **common)
    common["case"] += ", backward"
    yield Launch(kernel="query_backward", trips=20, bytes=5 * plane + 3 * numbers, flops=3 * product, **common)
    yield Launch(kernel="key_value_backward", trips=10, bytes=6 * plane + 2 * numbers, flops=4 * product, **common)
    share = common | {"programs": batch * pixels // 4096 * heads * 13 * 13}
    yield Launch(kernel="bias_backward", trips=32, bytes=4 * plane + 2 * numbers, flops=0, **share)
