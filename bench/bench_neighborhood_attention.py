"""neighborhood_attention against dense attention on the same tokens, and NATTEN where it is installed.

Eager is `scaled_dot_product_attention` of every pixel with every pixel: what these tokens cost without a neighborhood.

The floor is what the kernels must move: query, key, value and output once, 2 KB a token of 8 heads x 32 in half
precision; backward: these, the gradients of all four, lse and its like.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from inr_kernels import NeighborhoodAttention2D, neighborhood_attention_2d_packed

from .conftest import DEVICE

# batch, (H, W), heads, dim, kernel_size, dilation
SHAPES = {
    "cpu": [(1, (64, 64), 8, 32, 7, 1), (1, (64, 64), 8, 32, 7, 9), (4, (28, 28), 4, 32, 7, 1)],
    "cuda": [(1, (64, 64), 8, 32, 7, 1), (16, (64, 64), 8, 32, 7, 1), (16, (64, 64), 8, 32, 7, 9)],
}[DEVICE]
IMPLEMENTATIONS = ["eager", "ours", "eager bf16", "ours bf16"]
IMPLEMENTATIONS += ["compile", "compile bf16"] if DEVICE == "cuda" else []
IMPLEMENTATIONS += ["natten", "natten bf16"] if importlib.util.find_spec("natten") else []


def dense(qkv, kernel_size, dilation):
    """Every pixel attends to every pixel."""
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in qkv.unbind(3))
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(qkv.shape[:3] + qkv.shape[4:])


def ours(qkv, kernel_size, dilation):
    return neighborhood_attention_2d_packed(qkv, kernel_size, dilation=dilation)


def natten(qkv, kernel_size, dilation):
    """NATTEN itself, whichever of its backends it takes on this machine."""
    from natten import na2d

    return na2d(*qkv.unbind(3), kernel_size=kernel_size, dilation=dilation)


RUNS = {"eager": dense, "compile": torch.compile(dense), "ours": ours, "natten": natten}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_attention(measure, smoke, shape, gradients, implementation):
    batch, size, heads, dim, kernel_size, dilation = (1, (6, 7), 2, 4, 3, 2) if smoke else shape
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
        case=f"{'forward+backward' if gradients else 'forward'}, {batch} x {size[0]} x {size[1]}, "
        f"{heads} heads x {dim}, K {kernel_size}, dilation {dilation}",
        implementation=implementation,
        dtype=dtype,
        bytes=(12 if gradients else 4) * grad.numel() * grad.element_size(),
        small=batch == 1,
    )


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name.split()[0] in ("ours", "natten")])
def bench_module(measure, smoke, implementation):
    """Module against module, with both projections, on the first shape."""
    batch, size, heads, dim, kernel_size, dilation = (1, (6, 7), 2, 4, 3, 2) if smoke else SHAPES[0]
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    module = NeighborhoodAttention2D
    if implementation.startswith("natten"):
        from natten import NeighborhoodAttention2D as module
    layer = module(heads * dim, heads, kernel_size, dilation=dilation).to(DEVICE, dtype)
    x = torch.randn(batch, *size, heads * dim, device=DEVICE).to(dtype)
    with torch.no_grad():
        measure(
            lambda: layer(x),
            op="neighborhood_attention",
            case=f"module, {batch} x {size[0]} x {size[1]}, {heads} heads x {dim}, K {kernel_size}",
            implementation=implementation,
            dtype=dtype,
            bytes=10 * x.numel() * x.element_size(),  # in, qkv and the attended out and in again, out
            small=batch == 1,
        )
