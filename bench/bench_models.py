"""Whole networks against themselves in plain PyTorch (`reference=True`).

Eager is DEAR by unfolding, `scaled_dot_product_attention` on every pixel, and LIIF's decoding with its four
multi-layer perceptrons a query. The floor: every convolution, attention of the known pixels, and the decoder after the
hoist (`bench_local_implicit` says what that is).
"""

import functools
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from inr_kernels.models import DEAR, DEARConfig
from inr_kernels.models.dear.network import dear_loss, sample_queries

from .conftest import DEVICE

SMOKE = DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8))
HOLE = 0.25  # of the picture
IMPLEMENTATIONS = ["eager", "ours", "eager bf16", "ours bf16"]
IMPLEMENTATIONS += ["compile", "compile bf16", "ours graphed", "ours graphed bf16"] if DEVICE == "cuda" else []


def network(smoke, dtype, reference=False):
    """A DEAR of the paper's size, or a tiny one, and its input of `side`."""
    torch.manual_seed(0)
    return DEAR(SMOKE if smoke else DEARConfig(), reference=reference).to(DEVICE, dtype).eval()


def picture(side, dtype):
    """A square picture with a square hole."""
    mask = torch.zeros(1, 1, side, side, device=DEVICE, dtype=dtype)
    hole = round(side * HOLE**0.5)
    mask[..., :hole, :hole] = 1
    return torch.rand(1, 3, side, side, device=DEVICE).to(dtype), mask


def flops(config, mask, n):
    """What DEAR has to do for n x n pixels from the mask's."""
    pixels, known, features = mask.numel(), mask.numel() - mask.sum().item(), config.features
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = DEAR(config, reference=True)
        model.encode(torch.empty(1, 3, *mask.shape[2:]), torch.empty(mask.shape))
    convolutions = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "conv" in str(op))
    hidden = sum(a * b for a, b in itertools.pairwise(config.hidden))
    decoding = n * n * (4 * (hidden + 2 * config.hidden[0]) + config.hidden[-1] * 3)
    hoist = pixels * config.hidden[0] * (2 * features + 1)
    return convolutions + 2 * (2 * features * known * pixels + decoding + hoist)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_dear(measure, smoke, implementation):
    side, n = (8, 16) if smoke else (256, 1024) if DEVICE == "cuda" else (64, 256)
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    kind = implementation.removesuffix(" bf16")
    model = network(smoke, dtype, reference=kind in ("eager", "compile"))
    image, mask = picture(side, dtype)
    if kind == "ours graphed":
        run = functools.partial(model.graphed(image.shape, (n, n)), image, mask)
    else:
        run = functools.partial(torch.compile(model) if kind == "compile" else model, image, mask, (n, n))
    with torch.no_grad():
        measure(
            run,
            op="models",
            case=f"DEAR, {side}² → {n}²",
            implementation=implementation,
            dtype=dtype,
            flops=flops(model.config, mask, n),
        )


@pytest.mark.parametrize("implementation", ["ours", "ours bf16"])
@pytest.mark.parametrize("side", [256] if DEVICE == "cpu" else [512])
def bench_dear_large(measure, smoke, side, implementation):
    """Plain PyTorch would take minutes here, and gigabytes."""
    side, n = (9, 21) if smoke else (side, 4 * side)
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    model = network(smoke, dtype)
    image, mask = picture(side, dtype)
    with torch.no_grad():
        measure(
            lambda: model(image, mask, (n, n)),
            op="models",
            case=f"DEAR, {side}² → {n}²",
            implementation=implementation,
            dtype=dtype,
            flops=flops(model.config, mask, n),
            rounds=1,
        )


@pytest.mark.parametrize("implementation", ["eager", "ours"])
def bench_dear_training(measure, smoke, implementation):
    """A step of eq. 10: encode, colours of random pixels of a picture four times as large, the rebuilt input."""
    batch, side, queries = (1, 8, 5) if smoke else (16, 64, 2304) if DEVICE == "cuda" else (2, 32, 384)
    model = network(smoke, torch.float32, reference=implementation == "eager").train()
    image, mask = (t.expand(batch, -1, -1, -1) for t in picture(side, torch.float32))
    coord, cell, rgb = sample_queries(torch.rand(batch, 3, 4 * side, 4 * side, device=DEVICE), queries)

    def step():
        encoded, kernels, seen = model.encode(image, mask)
        colours = model.decode(encoded, seen, coord, cell if model.config.cell_decode else None)
        dear_loss(colours, rgb, model.reconstruct(image, mask, kernels), image).backward()
        model.zero_grad()

    measure(
        step,
        op="models",
        case=f"DEAR, training step, {batch} x {side}², {queries} queries each",
        implementation=implementation,
        dtype=torch.float32,
        flops=3 * batch * flops(model.config, mask[:1], queries**0.5),
        rounds=3,
    )
