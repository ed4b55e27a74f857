"""elementwise_filter against the forms that are common in PyTorch: F.unfold, and MISF's stack of shifted images.

The case is DEAR's: K_hp = delta - softmax over 3 x 3 taps, with a separate kernel for every channel and pixel. The
minimum memory traffic, in planes of the image's size: forward 11 (9 of logits, image, output), backward 21 (9 of
logits, 9 of their gradient, image, two gradients, output).
"""

import functools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import inr_kernels

from .conftest import DEVICE, random_leaf
from .launches import Launch, Native


class Shape(NamedTuple):
    """Shape of the image."""

    batch: int
    channels: int
    height: int
    width: int

    def __str__(self):
        return " x ".join(map(str, self))


SMOKE = Shape(1, 2, 6, 8)
SHAPES = {
    "cpu": [Shape(1, 256, 64, 64), Shape(16, 256, 16, 16), Shape(1, 3, 512, 512)],
    "cuda": [
        Shape(1, 256, 64, 64),  # DEAR's latent of one image of 256²
        Shape(16, 256, 64, 64),  # of sixteen
        Shape(16, 256, 16, 16),  # of sixteen of 64², as in training
        Shape(1, 256, 256, 256),
        Shape(8, 3, 1024, 1024),  # kernels on images
    ],
}[DEVICE]
IMPLEMENTATIONS = ["eager", "stack", "compile", "running sum, compile", "ours"]
IMPLEMENTATIONS += ["eager bf16", "running sum, compile bf16", "ours bf16"]
IMPLEMENTATIONS += ["compile bf16"] if DEVICE == "cuda" else []


def unfold(x, logits):
    """Filters with F.unfold: 9 shifted copies in one tensor."""
    shape = len(x), x.shape[1], 9, *x.shape[2:]
    weights = logits.view(shape).softmax(2)
    return 2 * x - (weights * F.unfold(x, 3, padding=1).view(shape)).sum(2)


def stack(x, logits):
    """Filters like MISF's KernelConv: with a stack of slices of the padded image."""
    (height, width), padded = x.shape[2:], F.pad(x, (1, 1, 1, 1))
    shifted = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    weights = logits.view(len(x), x.shape[1], 9, height, width).softmax(2)
    return 2 * x - (weights * torch.stack(shifted, 2)).sum(2)


def running_sum(x, logits):
    """Filters tap by tap, without a stack: the form that a compiler can fuse into one loop."""
    height, width = x.shape[2:]
    logits, padded = logits.view(len(x), x.shape[1], 9, height, width), F.pad(x, (1, 1, 1, 1))
    weights = (logits - logits.amax(2, keepdim=True)).exp()
    total = out = 0
    for tap in range(9):
        i, j = divmod(tap, 3)
        total = total + weights[:, :, tap]
        out = out + weights[:, :, tap] * padded[:, :, i : i + height, j : j + width]
    return 2 * x - out / total


@functools.cache
def compiled_running_sum():
    return torch.compile(running_sum)


@functools.cache
def compiled_reference():
    from inr_kernels.elementwise_filter.reference import elementwise_filter

    return torch.compile(elementwise_filter)


def compiled(x, logits):
    form = (3, 3), x.shape[1], (1,), 1, 1, "zeros", "taps", 2.0, 0.0, -1.0, None
    return compiled_reference()(x, logits, *form)[0]


def ours(x, logits):
    return inr_kernels.elementwise_filter(x, logits, kernel_size=3, normalize="taps", alpha=2.0, gamma=-1.0)


def summed(x, logits):
    return compiled_running_sum()(x, logits)


RUNS = {"eager": unfold, "stack": stack, "compile": compiled, "running sum, compile": summed, "ours": ours}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_filter(measure, smoke, shape, gradients, implementation):
    shape = SMOKE if smoke else shape
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    logits_shape = shape._replace(channels=9 * shape.channels)
    x, logits = (torch.randn(s, device=DEVICE).to(dtype).requires_grad_(gradients) for s in (shape, logits_shape))
    grad = torch.randn_like(x)
    run = RUNS[implementation.removesuffix(" bf16")]

    def step():
        out = run(x, logits)
        if gradients:
            torch.autograd.grad(out, [x, logits], grad)

    measure(
        step,
        op="elementwise_filter",
        case=f"{'forward+backward' if gradients else 'forward'}, {shape}",
        implementation=implementation,
        dtype=dtype,
        bytes=(32 if gradients else 11) * x.numel() * x.element_size(),
        small=x.numel() <= 1 << 20,
    )


def first_calls(small):
    """Yields DEAR's filter; small: also with one softmax over all channels of the logits."""
    batch, channels, *sides = (1, 4, 9, 11) if small else (1, 256, 64, 64)
    form = {"kernel_size": 3, "padding": "reflect", "alpha": 2.0, "gamma": -1.0}
    for normalize in ("taps", "all") if small else ("taps",):
        leaves = random_leaf(batch, channels, *sides), random_leaf(batch, 9 * channels, *sides)
        yield functools.partial(inr_kernels.elementwise_filter, *leaves, normalize=normalize, **form), leaves


def launches():
    """Yields DEAR's filter on the latents of sixteen images of 256²; bytes in planes of the image's size.

    The instructions of the forward in CUDA C++ include its path for unaligned rows, which does not run here.
    """
    from inr_kernels.elementwise_filter.triton_kernels import smallest_cover

    tile = smallest_cover((64, 64), (0, 0), (1, 1), (1, 4), 1024)
    values, programs = 16 * 256 * 64 * 64, 16 * 256 * 64 * 64 // 128
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        common = {"op": "elementwise_filter", "mode": "DEAR", "dtype": dtype, "flops": 0, "trips": 1}
        common |= {"case": f"16 x 256 x 64², {dtype}", "programs": programs}
        plane = values * size
        yield Launch(kernel="filter_pixels", bytes=11 * plane, **common)
        cuda = common | {"programs": 16 * 256 * 64 * 16 // 128, "native": Native("filter_3x3, CUDA C++", 4, 0)}
        yield Launch(kernel=f"filter_3x3ILNS_4TypeE{0 if size == 4 else 2}E", bytes=11 * plane, **cuda)
        common |= {"case": f"16 x 256 x 64², {dtype}, backward", "programs": 16 * 256 * math.prod(tile.counts)}
        yield Launch(kernel="gradients", bytes=21 * plane, **common)
        # Rectangles of 13 rows, with a halo of one row and, for whole quads, four columns on each side.
        shared = (9 + 2) * (13 + 2) * (64 + 8) * 4
        cuda = common | {"programs": 16 * 256 * 5, "native": Native("gradients, CUDA C++", 8, shared)}
        yield Launch(kernel=f"gradientsILNS_4TypeE{0 if size == 4 else 2}ELi3ELb1E", bytes=21 * plane, **cuda)
    # PASA's low-pass filter of the same maps, with stride 2: one softmax over the taps of two groups.
    image, out, logits, pixels = 2 * values, 2 * values // 4, 2 * 16 * 18 * 32 * 32, 4 * 16 * 32 * 32
    common = {"op": "elementwise_filter", "mode": "PASA", "dtype": "bfloat16", "flops": 0}
    common["case"] = "16 x 256 x 64², 2 groups, stride 2, bfloat16, backward"
    yield Launch(kernel="logsumexp", programs=16 * 8, trips=18, bytes=logits + pixels, **common)
    common["programs"] = 16 * 2 * 8
    yield Launch(kernel="kernel_gradient", trips=9 * 16, bytes=image + out + 2 * logits + 3 * pixels, **common)
    common["programs"] = 16 * 2 * 16 * 35
    yield Launch(kernel="image_gradient", trips=9, bytes=4 * image + out + logits + pixels, **common)
