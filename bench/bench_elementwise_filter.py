"""elementwise_filter against the forms that people write in PyTorch: F.unfold, and MISF's stack of shifted images.

The case is DEAR's: K_hp = delta - softmax over 3 x 3 taps, every channel with kernels of its own. The floor, in planes
of the image's size: forward 11 (9 of logits, image, output), backward 21 (9 + 9, image, two gradients, output).
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from inr_kernels import elementwise_filter
from inr_kernels.elementwise_filter.reference import elementwise_filter as reference

from .conftest import DEVICE

SHAPES = {
    "cpu": [(1, 256, 64, 64), (16, 256, 16, 16), (1, 3, 512, 512)],
    # DEAR's latent of a picture of 256², one and sixteen; of 64² in training; a map of 256²; kernels on pictures
    "cuda": [(1, 256, 64, 64), (16, 256, 64, 64), (16, 256, 16, 16), (1, 256, 256, 256), (8, 3, 1024, 1024)],
}[DEVICE]
IMPLEMENTATIONS = ["eager", "stack", "compile", "ours", "eager bf16", "ours bf16"]
IMPLEMENTATIONS += ["compile bf16"] if DEVICE == "cuda" else []


def unfold(x, logits):
    """The form with F.unfold: 9 shifted copies in one tensor."""
    shape = len(x), x.shape[1], 9, *x.shape[2:]
    weights = logits.view(shape).softmax(2)
    return 2 * x - (weights * F.unfold(x, 3, padding=1).view(shape)).sum(2)


def stack(x, logits):
    """The form of MISF's KernelConv: a stack of slices of the padded image."""
    (height, width), padded = x.shape[2:], F.pad(x, (1, 1, 1, 1))
    shifted = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    weights = logits.view(len(x), x.shape[1], 9, height, width).softmax(2)
    return 2 * x - (weights * torch.stack(shifted, 2)).sum(2)


@functools.cache
def compiled_reference():
    return torch.compile(reference)


def implementations(channels):
    """{name: function of image and logits}."""
    form = (3, 3), channels, (1,), 1, 1, "zeros", "taps", 2.0, 0.0, -1.0, None
    ours = functools.partial(elementwise_filter, kernel_size=3, normalize="taps", alpha=2.0, gamma=-1.0)
    compiled = lambda x, logits: compiled_reference()(x, logits, *form)[0]  # noqa: E731
    return {"eager": unfold, "stack": stack, "compile": compiled, "ours": ours}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_filter(measure, smoke, shape, gradients, implementation):
    batch, channels, height, width = (1, 2, 6, 8) if smoke else shape
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    x = torch.randn(batch, channels, height, width, device=DEVICE).to(dtype).requires_grad_(gradients)
    logits = torch.randn(batch, 9 * channels, height, width, device=DEVICE).to(dtype).requires_grad_(gradients)
    grad = torch.randn_like(x)
    run = implementations(channels)[implementation.removesuffix(" bf16")]

    def step():
        out = run(x, logits)
        if gradients:
            torch.autograd.grad(out, [x, logits], grad)

    measure(
        step,
        op="elementwise_filter",
        case=f"{'forward+backward' if gradients else 'forward'}, {batch} x {channels} x {height} x {width}",
        implementation=implementation,
        dtype=dtype,
        bytes=(32 if gradients else 11) * x.numel() * x.element_size(),
        small=x.numel() <= 1 << 20,
    )
