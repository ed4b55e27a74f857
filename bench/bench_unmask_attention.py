"""unmask_attention against PyTorch's fused attention, which computes every row, and against eq. 7 as written.

Eager is `scaled_dot_product_attention` on the same tokens. The minimum work, in multiply-adds: forward 2 C per pair of
a known pixel and any pixel (score, weighted sum); backward 5 C per pair of known pixels (score, two products with the
gradient, two weighted sums), 7 C where one of the pair is masked, for both directions together.
"""

import functools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import inr_kernels

from .conftest import DEVICE, random_leaf
from .launches import Launch

CHANNELS = 64


class Shape(NamedTuple):
    """A batch of square maps, and how many percent of their pixels are masked."""

    batch: int
    side: int
    masked: int

    def __str__(self):
        return f"{self.batch} x {self.side}², {self.masked} % hole"


SMOKE = Shape(2, 6, 40)
SHAPES = {
    "cpu": [Shape(1, 64, 0), Shape(1, 64, 40), Shape(1, 64, 80), Shape(16, 16, 40)],
    "cuda": [Shape(1, 64, 40), Shape(16, 64, 0), Shape(16, 64, 40), Shape(16, 64, 80), Shape(1, 256, 40)],
}[DEVICE]
IMPLEMENTATIONS = ["eager", "matrix", "ours", "eager bf16", "ours bf16"]
IMPLEMENTATIONS += ["compile", "compile bf16"] if DEVICE == "cuda" else []


def eager(feat, mask):
    """Attends with PyTorch's attention; its flash kernel needs four dimensions and contiguous tokens."""
    tokens = feat.flatten(2).mT[:, None].contiguous()
    queries = (1 - mask.flatten(2).mT[:, None]) * tokens
    return F.scaled_dot_product_attention(queries, tokens, tokens)[:, 0].mT.reshape(feat.shape)


def matrix(feat, mask):
    """Attends by eq. 7 as written, with its N x N matrix."""
    tokens = feat.flatten(2).mT
    scores = (1 - mask.flatten(2).mT) * tokens @ tokens.mT / CHANNELS**0.5
    return (scores.softmax(2) @ tokens).mT.reshape(feat.shape)


@functools.cache
def compiled_eager():
    return torch.compile(eager)


def products(known, tokens, gradients=False):
    """Returns the multiply-adds of one image per channel; with `gradients` those of forward and backward."""
    return 2 * known * tokens + (5 * known * known + 7 * known * (tokens - known) if gradients else 0)


RUNS = {
    "eager": eager,
    "matrix": matrix,
    "compile": lambda feat, mask: compiled_eager()(feat, mask),
    "ours": lambda feat, mask: inr_kernels.unmask_attention(feat, mask),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_attention(measure, smoke, shape, gradients, implementation):
    shape = SMOKE if smoke else shape
    batch, side, masked = shape
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    feat = torch.randn(batch, CHANNELS, side, side, device=DEVICE).to(dtype).requires_grad_(gradients)
    tokens, known = side * side, side * side * (100 - masked) // 100
    mask = (torch.rand(batch, 1, tokens, device=DEVICE).argsort(2) >= known).to(dtype).view(batch, 1, side, side)
    grad = torch.randn_like(feat)
    run = RUNS[implementation.removesuffix(" bf16")]

    def step():
        out = run(feat, mask)
        if gradients:
            torch.autograd.grad(out, feat, grad)

    measure(
        step,
        op="unmask_attention",
        case=f"{'forward+backward' if gradients else 'forward'}, {shape}",
        implementation=implementation,
        dtype=dtype,
        flops=2 * batch * CHANNELS * products(known, tokens, gradients),
        small=feat.numel() <= 1 << 20,
    )


def first_calls(small):
    """Yields DEAR's attention; small: also with masked keys."""
    batch, channels, *sides = (2, 20, 9, 11) if small else (1, 64, 64, 64)
    for mask_keys in (False, True) if small else (False,):
        feat, mask = random_leaf(batch, channels, *sides), (random_leaf(batch, 1, *sides) > 0).float()
        yield functools.partial(inr_kernels.unmask_attention, feat, mask, mask_keys=mask_keys), [feat]


def launches():
    """Yields DEAR's attention on sixteen feature maps of 64², 40 % masked; the known queries are stored first."""
    batch, tokens, known, channels, columns = 16, 4096, 4096 * 6 // 10, 64, 32
    plane = 2 * batch * tokens * channels
    common = {"op": "unmask_attention", "mode": "64", "dtype": "bfloat16", "case": "16 x 64², 40 % hole"}
    forward = 2 * batch * channels * products(known, tokens)
    both = 2 * batch * channels * products(known, tokens, True)
    share = known / tokens
    yield Launch(
        kernel="attend",
        programs=batch * math.ceil(known / 64),
        trips=tokens / columns,
        bytes=(1 + share) * plane,
        flops=forward,
        **common,
    )
    common["case"] += ", backward"
    query_blocks, blocks = math.ceil(known / 32), tokens // 32
    trips = (query_blocks * tokens + (blocks - query_blocks) * known) / blocks / columns
    moved = (1 + share + 2) * plane  # the result is float32
    common |= {"programs": batch * blocks, "trips": trips}
    yield Launch(kernel="attend_backward", bytes=moved, flops=both - forward, **common)
