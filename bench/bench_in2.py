"""IN² against its plain PyTorch twin (`eager=True`): whole images, a training step, and an INRB alone.

Eager is LaMa's order of operations in the encoder, neighborhood attention by gathering every query's window, and the
four-neighbour formula of every INRB on all queries at once. The minimum work: every convolution and matrix product of
encoder and body (Fourier transforms not counted), and the decoder after the hoist.
"""

import functools
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from inr_kernels.models import IN2, ImplicitUpsample, IN2Config

from . import peers
from .conftest import DEVICE

TWIN = {"eager": True}  # older revisions lack this keyword: only the twins take it
SMOKE = IN2Config(channels=(16, 16, 32), blocks=1, heads=4, hidden=(16, 16))
IMPLEMENTATIONS = ["eager", "ours", "eager bf16", "ours bf16"]
ON_A_GPU = ["compile bf16", "ours graphed", "ours graphed bf16"] if DEVICE == "cuda" else []


def upsampling_flops(channels, hidden, outputs, pixels, queries):
    """Returns the FLOPs of an INRB of mode "split" after the hoist."""
    inner = sum(a * b for a, b in itertools.pairwise((*hidden, outputs))) + 2 * hidden[1]
    return 2 * (pixels * channels * hidden[0] + queries * (4 * 2 * hidden[0] + inner))


def flops(config, size):
    """Returns the FLOPs of IN² on an image of `size`."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        IN2(config, **TWIN).eval().encode(torch.empty(1, 3, *size), torch.empty(1, 1, *size))
    total = counter.get_total_flops()
    pixels, outputs = [h * w for h, w in (size, *config.grids(size))], (27, *config.channels)  # 27: with the head
    for level, channels in enumerate(config.channels):
        total += upsampling_flops(channels, config.hidden, outputs[level], pixels[level + 1], pixels[level])
    return total


def problem(smoke, size, dtype, twin=False):
    """Returns an IN² of the paper's size, or a tiny one, and an image whose upper left quarter is masked."""
    config, size = (SMOKE, (24, 17)) if smoke else (IN2Config(), size)
    model = IN2(config, **(TWIN if twin else {})).to(DEVICE, dtype).eval()
    image, mask = torch.rand(1, 3, *size, device=DEVICE), torch.zeros(1, 1, *size, device=DEVICE)
    mask[..., : size[0] // 2, : size[1] // 2] = 1
    return model, image, mask


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS + peers.PEERS + ON_A_GPU)
@pytest.mark.parametrize("size", [(512, 512), (683, 384)])
def bench_image(measure, smoke, size, implementation):
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    kind = implementation.removesuffix(" bf16")
    if kind in peers.RUNTIMES and (smoke or size[0] != size[1]):
        pytest.skip("the export takes a minute: only of the first size")
    model, image, mask = problem(smoke, size, dtype, twin=not kind.startswith("ours"))
    with torch.no_grad():
        if kind in peers.PEERS:
            run = peers.take(kind, model, (image, mask), dtype, lambda: peers.exported_network(model, image.shape[2:]))
        else:
            run = functools.partial(model.graphed(image.shape) if kind == "ours graphed" else model, image, mask)
        measure(
            run,
            op="in2",
            case=f"{image.shape[2]} x {image.shape[3]}",
            implementation=implementation,
            dtype=dtype,
            flops=lambda: flops(model.config, image.shape[2:]),
            rounds=3,
        )


@pytest.mark.parametrize("implementation", ["eager", "ours"])
def bench_training(measure, smoke, implementation):
    """Measures a step with the L1 loss alone: the paper's other losses cost both implementations the same."""
    side = 256 if DEVICE == "cuda" else 64
    model, image, mask = problem(smoke, (side, side), torch.float32, twin=implementation == "eager")
    model.train()

    def step():
        (model.predict(image, mask) - image).abs().mean().backward()
        model.zero_grad()

    measure(
        step,
        op="in2",
        case=f"training step, {image.shape[2]} x {image.shape[3]}",
        implementation=implementation,
        dtype=torch.float32,
        flops=lambda: 3 * flops(model.config, image.shape[2:]),
        rounds=3,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_last_inrb(measure, smoke, implementation):
    side, hidden = (4, (16, 16)) if smoke else (256, IN2Config.hidden)
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    twin = TWIN if implementation.startswith("eager") else {}
    layer = ImplicitUpsample(64, 64, hidden, **twin).to(DEVICE, dtype)
    feat = torch.randn(1, 64, side, side, device=DEVICE).to(dtype)
    with torch.no_grad():
        measure(
            lambda: layer(feat, (2 * side, 2 * side)),
            op="in2",
            case=f"the last INRB alone, {side}² → {2 * side}²",
            implementation=implementation,
            dtype=dtype,
            flops=upsampling_flops(64, hidden, 64, side * side, 4 * side * side),
            rounds=3,
        )
