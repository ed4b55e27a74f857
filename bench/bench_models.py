"""Whole networks against plain PyTorch, its compiler and its layouts, ONNX Runtime and OpenVINO.

Eager is DEAR with unfolded filters, `scaled_dot_product_attention` on every pixel, and LIIF's decoding with four
multi-layer perceptrons per query. The minimum work: every convolution, attention of the known pixels, and the decoder
after the hoist (see `bench_local_implicit`). For LaMa, eager is its own order of operations; the runtimes get it with
Fourier transforms as matrix products, the form that they can run.
"""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import inr_kernels
from inr_kernels.models import DEAR, LIIF, DEARConfig, LaMa, LaMaConfig, LIIFConfig

from . import peers
from .bench_fourier_unit import lama_generator
from .conftest import DEVICE

SMOKE = DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8))
TWIN = {"eager": True}  # older revisions lack this keyword: only the twins take it
HOLE = 0.25  # of the image
IMPLEMENTATIONS = ["eager", *peers.PEERS, "ours", "eager bf16", "ours bf16"]
IMPLEMENTATIONS += ["compile bf16", "ours graphed", "ours graphed bf16"] if DEVICE == "cuda" else ["OpenVINO bf16"]
LAMA = ["eager", "channels last", *peers.PEERS, "ours"]
LAMA += ["eager bf16", "channels last bf16", "OpenVINO bf16", "ours bf16"]


def network(smoke, dtype, twin=False):
    """Returns a DEAR of the paper's size, or a tiny one."""
    torch.manual_seed(0)
    return DEAR(SMOKE if smoke else DEARConfig(), **(TWIN if twin else {})).to(DEVICE, dtype).eval()


def masked_image(side, dtype):
    """Returns a square image and its mask, a square hole."""
    mask = torch.zeros(1, 1, side, side, device=DEVICE, dtype=dtype)
    hole = round(side * HOLE**0.5)
    mask[..., :hole, :hole] = 1
    return torch.rand(1, 3, side, side, device=DEVICE).to(dtype), mask


def flops(config, mask, n):
    """Returns the FLOPs of DEAR from the mask's size to n x n pixels."""
    pixels, known, features = mask.numel(), mask.numel() - mask.sum().item(), config.features
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = DEAR(config, **TWIN)
        model.encode(torch.empty(1, 3, *mask.shape[2:]), torch.empty(mask.shape))
    convolutions = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "conv" in str(op))
    hidden = sum(a * b for a, b in itertools.pairwise(config.hidden))
    decoding = n * n * (4 * (hidden + 2 * config.hidden[0]) + config.hidden[-1] * 3)
    hoist = pixels * config.hidden[0] * (2 * features + 1)
    return convolutions + 2 * (2 * features * known * pixels + decoding + hoist)


def lama_flops(config, side):
    """Returns the FLOPs of LaMa's convolutions, computed directly; its Fourier transforms are not counted."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        LaMa(config).eval().model(torch.empty(1, 4, side, side))
    return counter.get_total_flops()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_dear(measure, smoke, implementation):
    side, n = (8, 16) if smoke else (256, 1024) if DEVICE == "cuda" else (64, 256)
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    kind = implementation.removesuffix(" bf16")
    of_model = torch.float32 if kind in peers.RUNTIMES else dtype
    model = network(smoke, of_model, twin=not kind.startswith("ours"))
    image, mask = masked_image(side, of_model)
    with torch.no_grad():
        if kind == "ours graphed":
            run = functools.partial(model.graphed(image.shape, (n, n)), image, mask)
        elif kind in peers.PEERS:
            run = peers.take(kind, peers.Form(lambda *masked: model(*masked, (n, n))), (image, mask), dtype)
        else:
            run = functools.partial(model, image, mask, (n, n))
        measure(
            run,
            op="models",
            case=f"DEAR, {side}² → {n}²",
            implementation=implementation,
            dtype=dtype,
            flops=lambda: flops(model.config, mask, n),
        )


@pytest.mark.parametrize("implementation", ["ours", "ours bf16"])
@pytest.mark.parametrize("side", [256] if DEVICE == "cpu" else [512])
def bench_dear_large(measure, smoke, side, implementation):
    """Measures a size at which plain PyTorch takes minutes and gigabytes."""
    side, n = (9, 21) if smoke else (side, 4 * side)
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    model = network(smoke, dtype)
    image, mask = masked_image(side, dtype)
    with torch.no_grad():
        measure(
            lambda: model(image, mask, (n, n)),
            op="models",
            case=f"DEAR, {side}² → {n}²",
            implementation=implementation,
            dtype=dtype,
            flops=lambda: flops(model.config, mask, n),
            rounds=1,
        )


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("implementation", LAMA)
@pytest.mark.parametrize(("blocks", "side"), [(9, 64), (9, 256), (9, 512), (18, 512)])
def bench_lama(measure, smoke, blocks, side, implementation):
    """Measures LaMa, of 9 blocks, and Big-LaMa, of 18."""
    if smoke and (blocks, side) != (9, 256):
        pytest.skip("the tiny network has one size")
    config, side = (LaMaConfig(features=8, blocks=1), 24) if smoke else (LaMaConfig(blocks=blocks), side)
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    kind = implementation.removesuffix(" bf16")
    of_model = torch.float32 if kind in peers.RUNTIMES else dtype
    torch.manual_seed(0)
    model = LaMa(config).to(DEVICE, of_model).eval().requires_grad_(False)
    image, mask = masked_image(side, of_model)
    x = torch.cat((image * (1 - mask), mask), 1)
    with torch.no_grad():
        if kind in peers.RUNTIMES:
            run = peers.take(kind, model, (image, mask), dtype, lambda: peers.exported_network(model, (side, side)))
        elif kind == "ours":
            run = functools.partial(model.model, x)
        else:
            form = peers.Form(functools.partial(lama_generator, model.model))
            if kind == "channels last":
                model.to(memory_format=torch.channels_last)
                x = x.contiguous(memory_format=torch.channels_last)
            run = peers.take("compile", form, (x,)) if kind == "compile" else functools.partial(form, x)
        measure(
            run,
            op="models",
            case=f"{'Big-LaMa' if blocks == 18 else 'LaMa'}, {side}²",
            implementation=implementation,
            dtype=dtype,
            flops=lambda: lama_flops(config, side),
            rounds=5,
        )


@pytest.mark.parametrize("implementation", ["eager", "ours"])
def bench_dear_training(measure, smoke, implementation):
    """Measures a step of eq. 10: colours of random pixels of an image four times as large, and the rebuilt input."""
    batch, side, queries = (1, 8, 5) if smoke else (16, 64, 2304) if DEVICE == "cuda" else (2, 32, 384)
    eager = implementation == "eager"
    model = network(smoke, torch.float32, twin=eager).train()
    image, mask = (t.expand(batch, -1, -1, -1) for t in masked_image(side, torch.float32))
    pixels = torch.randint(4 * side, (batch, queries, 2), device=DEVICE)
    coord, rgb = (2 * pixels + 1) / (4 * side) - 1, torch.rand(batch, queries, 3, device=DEVICE)
    cell = torch.full((batch, 2), 2 / (4 * side), device=DEVICE) if model.config.cell_decode else None

    def step():
        encoded, kernels, _ = model.encode(image, mask)
        colours = model.implicit(encoded, coord, cell, backend="reference" if eager else None)
        rebuilt = model.reconstruct(image, mask, kernels)
        (F.l1_loss(colours, rgb) + 0.01 * F.l1_loss(rebuilt, image)).backward()
        model.zero_grad()

    measure(
        step,
        op="models",
        case=f"DEAR, training step, {batch} x {side}², {queries} queries each",
        implementation=implementation,
        dtype=torch.float32,
        flops=lambda: 3 * batch * flops(model.config, mask[:1], queries**0.5),
        rounds=3,
    )


def liif_training_flops(model, image, queries):
    """Returns the FLOPs of a training step of LIIF, whose decoder is computed again for the backward."""
    from .bench_local_implicit import decoder_macs, hoist_macs

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        LIIF(model.config).encoder(torch.empty(image.shape))
    pixels = len(image) * image[0, 0].numel()
    return 3 * counter.get_total_flops() + 2 * (4 * decoder_macs(queries) + 3 * hoist_macs(pixels))


@pytest.mark.parametrize("implementation", ["eager", "ours"])
def bench_liif_training(measure, smoke, implementation):
    """Measures a step of LIIF with its encoder, EDSR-baseline, on the batch of its paper."""
    batch, side, queries = (1, 8, 5) if smoke else (16, 48, 2304)
    model = LIIF(LIIFConfig(blocks=1, features=16, hidden=(16, 16)) if smoke else LIIFConfig()).to(DEVICE).train()
    image, coord = torch.rand(batch, 3, side, side, device=DEVICE), torch.rand(batch, queries, 2, device=DEVICE) * 2 - 1
    cell = torch.full((batch, queries, 2), 2 / 150, device=DEVICE)
    eager = implementation == "eager"

    def step():
        with inr_kernels.backend("reference") if eager else contextlib.nullcontext():
            model(image, coord, cell).abs().mean().backward()
        model.zero_grad()

    measure(
        step,
        op="models",
        case=f"LIIF, training step, {batch} x {side}², {queries} queries each",
        implementation=implementation,
        dtype=torch.float32,
        flops=lambda: liif_training_flops(model, image, batch * queries),
        rounds=3,
    )
