"""unmask_attention against the framework's fused attention, which computes every row, and against eq. 7 as written.

Eager is `scaled_dot_product_attention` on the same tokens. The floor, in multiply-adds: forward 2 C per known pixel and
pixel (score, mix); backward 5 C per pair of known pixels (score, two products with the gradient, two mixes), 7 C where
one of the pair is masked, for its two directions together.
"""

import pytest
import torch
import torch.nn.functional as F

from inr_kernels import unmask_attention

from .conftest import DEVICE

CHANNELS = 64
# (batch, side, percent of hole)
SHAPES = {
    "cpu": [(1, 64, 0), (1, 64, 40), (1, 64, 80), (16, 16, 40)],
    "cuda": [(1, 64, 40), (16, 64, 0), (16, 64, 40), (16, 64, 80), (1, 256, 40)],
}[DEVICE]
IMPLEMENTATIONS = ["eager", "matrix", "ours", "eager bf16", "ours bf16"]
IMPLEMENTATIONS += ["compile", "compile bf16"] if DEVICE == "cuda" else []


def eager(feat, mask):
    """The framework's attention; its flash kernel takes four dimensions and contiguous tokens."""
    tokens = feat.flatten(2).mT[:, None].contiguous()
    queries = (1 - mask.flatten(2).mT[:, None]) * tokens
    return F.scaled_dot_product_attention(queries, tokens, tokens)[:, 0].mT.reshape(feat.shape)


def matrix(feat, mask):
    """Eq. 7 as written, with its N x N matrix."""
    tokens = feat.flatten(2).mT
    scores = (1 - mask.flatten(2).mT) * tokens @ tokens.mT / CHANNELS**0.5
    return (scores.softmax(2) @ tokens).mT.reshape(feat.shape)


def products(known, tokens, gradients=False):
    """Multiply-adds of an image, for each channel."""
    return 2 * known * tokens + (5 * known * known + 7 * known * (tokens - known) if gradients else 0)


RUN = {"eager": eager, "matrix": matrix, "compile": torch.compile(eager), "ours": unmask_attention}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_attention(measure, smoke, shape, gradients, implementation):
    batch, side, percent = (2, 6, 40) if smoke else shape
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    feat = torch.randn(batch, CHANNELS, side, side, device=DEVICE).to(dtype).requires_grad_(gradients)
    tokens, known = side * side, side * side * (100 - percent) // 100
    mask = (torch.rand(batch, 1, tokens, device=DEVICE).argsort(2) >= known).to(dtype).view(batch, 1, side, side)
    grad = torch.randn_like(feat)
    run = RUN[implementation.removesuffix(" bf16")]

    def step():
        out = run(feat, mask)
        if gradients:
            torch.autograd.grad(out, feat, grad)

    measure(
        step,
        op="unmask_attention",
        case=f"{'forward+backward' if gradients else 'forward'}, {batch} x {side}², {percent} % hole",
        implementation=implementation,
        dtype=dtype,
        flops=2 * batch * CHANNELS * products(known, tokens, gradients),
        small=feat.numel() <= 1 << 20,
    )
