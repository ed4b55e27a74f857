"""fourier_unit: LaMa's FFC block, its Fourier unit alone and a training step, against LaMa's own operations in PyTorch.

The minimum work: a block's 3 x 3 convolutions make up 82 % of its multiply-adds directly and 60 % with Winograd's
F(4 x 2, 3 x 3), which needs 3 instead of 9 per value; the rest are three 1 x 1 convolutions, one of them on the
spectrum, and 2.5 n log2 n per transform. FLOPs are counted for the Winograd form, so that the fraction of the GEMM's
rate counts necessary work only.
"""

import functools
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

import inr_kernels

from .conftest import DEVICE, random_leaf
from .launches import Launch


class Shape(NamedTuple):
    """Channels of both parts together, and the side of the map."""

    channels: int
    side: int


SMOKE = Shape(16, 8)
# Big-LaMa at 512² and 1024², the middle and first levels of IN² at 512².
SHAPES = {
    "cpu": [Shape(512, 64), Shape(512, 128), Shape(128, 128), Shape(64, 256)],
    "cuda": [Shape(512, 64), Shape(512, 128), Shape(64, 256)],
}[DEVICE]
IMPLEMENTATIONS = ["eager", "compile", "ours", "eager bf16", "ours bf16"]


def lama_unit(unit, x):
    """Computes LaMa's FourierUnit: both parts are stacked, permuted and copied before and after the convolution."""
    z = torch.fft.rfftn(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(-2, -1), norm="ortho")
    z = torch.stack((z.real, z.imag), -1).permute(0, 1, 4, 2, 3).contiguous()
    z = z.view(len(z), -1, *z.shape[3:]).to(x.dtype)
    z = torch.relu_(unit.bn(unit.conv_layer(z)))
    z = z.view(len(z), -1, 2, *z.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
    z = z.to(torch.promote_types(x.dtype, torch.float32))
    z = torch.complex(z[..., 0], z[..., 1])
    return torch.fft.irfftn(z, s=x.shape[2:], dim=(-2, -1), norm="ortho").to(x.dtype)


def lama_layer(layer, x_l, x_g):
    """Computes LaMa's FFC_BN_ACT: four convolutions, two sums, two norms, two ReLUs."""
    ffc, spectral = layer.ffc, layer.ffc.convg2g
    y = spectral.conv1(x_g)
    y = spectral.conv2(y + lama_unit(spectral.fu, y))
    out_l, out_g = ffc.convl2l(x_l) + ffc.convg2l(x_g), ffc.convl2g(x_l) + y
    return layer.act_l(layer.bn_l(out_l)), layer.act_g(layer.bn_g(out_g))


def lama_block(block, x_l, x_g):
    """Computes LaMa's FFCResnetBlock."""
    y_l, y_g = lama_layer(block.conv2, *lama_layer(block.conv1, x_l, x_g))
    return x_l + y_l, x_g + y_g


def lama_generator(layers, x):
    """Computes LaMa's generator from its layers: a tensor until the last convolution with a stride, then a pair."""
    for layer in layers:
        if hasattr(layer, "ffc"):
            x = _first_layers(layer, x)
        else:
            x = lama_block(layer, *x) if isinstance(x, tuple) and hasattr(layer, "conv1") else layer(x)
    return x


def _first_layers(layer, x):
    """An FFC_BN_ACT whose input is local only; its output is, too, or is a pair."""
    ffc, out_l = layer.ffc, layer.act_l(layer.bn_l(layer.ffc.convl2l(x)))
    return out_l if ffc.ratio_gout == 0 else (out_l, layer.act_g(layer.bn_g(ffc.convl2g(x))))


@functools.cache
def compiled_block():
    return torch.compile(lama_block)


def problem(shape, dtype):
    """Returns a block in evaluation mode, with 3/4 of its channels global, and its input."""
    from inr_kernels.fourier_unit import FFCResnetBlock

    channels, side = shape
    block = FFCResnetBlock(channels, "reflect", nn.BatchNorm2d, ratio_gin=0.75, ratio_gout=0.75, enable_lfu=False)
    x = [torch.randn(1, n, side, side, device=DEVICE).to(dtype).relu_() for n in (channels // 4, 3 * channels // 4)]
    return block.to(DEVICE, dtype).eval(), x


def unit_flops(shape):
    """Returns the FLOPs of the Fourier unit in a layer."""
    half, pixels, spectrum = 3 * shape.channels // 8, shape.side**2, shape.side * (shape.side // 2 + 1)
    return 8 * half * half * spectrum + 2 * half * 2.5 * pixels * math.log2(pixels)


def layer_flops(shape):
    """Returns the FLOPs of a layer (FFC_BN_ACT) in the cheapest known form."""
    local, glob, pixels = shape.channels // 4, 3 * shape.channels // 4, shape.side**2
    convolutions = 4 * glob * (glob // 2) * pixels + 6 * (local * local + 2 * local * glob) * pixels
    return unit_flops(shape) + convolutions


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_block(measure, smoke, shape, implementation):
    shape = SMOKE if smoke else shape
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    block, x = problem(shape, dtype)
    run = {
        "eager": lambda: lama_block(block, *x),
        "compile": lambda: compiled_block()(block, *x),
        "ours": lambda: block(tuple(x)),
    }[implementation.removesuffix(" bf16")]
    with torch.no_grad():
        measure(
            run,
            op="fourier_unit",
            case=f"FFC block, {shape.channels} x {shape.side}²",
            implementation=implementation,
            dtype=dtype,
            flops=2 * layer_flops(shape),
            small=True,
        )


@pytest.mark.parametrize("implementation", ["eager", "ours"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_unit(measure, smoke, shape, implementation):
    shape = SMOKE if smoke else shape
    block, (_, x) = problem(shape, torch.float32)
    unit, x = block.conv1.ffc.convg2g.fu, x[:, : 3 * shape.channels // 8].contiguous()
    with torch.no_grad():
        measure(
            (lambda: unit(x)) if implementation == "ours" else lambda: lama_unit(unit, x),
            op="fourier_unit",
            case=f"Fourier unit alone, {x.shape[1]} x {shape.side}²",
            implementation=implementation,
            dtype=torch.float32,
            flops=unit_flops(shape),
            small=True,
        )


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("implementation", ["eager", "compile", "ours"])
@pytest.mark.parametrize("training", [False, True], ids=["input gradient", "training"])
def bench_backward(measure, smoke, training, implementation):
    """Measures a training step, or forward and input gradient in evaluation mode, as in feature refinement."""
    shape = SMOKE if smoke else SHAPES[0]
    block, x = problem(shape, torch.float32)
    block.train(training).requires_grad_(training)
    leaves = [part.requires_grad_() for part in x]
    run = {"eager": lama_block, "compile": compiled_block(), "ours": lambda block, *parts: block(parts)}[implementation]

    def step():
        out = run(block, *leaves)
        torch.autograd.grad(sum(part.sum() for part in out), [*leaves, *(block.parameters() if training else ())])

    kind = "training step" if training else "forward + gradient of the input"
    measure(
        step,
        op="fourier_unit",
        case=f"FFC block, {shape.channels} x {shape.side}², {kind}",
        implementation=implementation,
        dtype=torch.float32,
        flops=2 * (3 if training else 2) * layer_flops(shape),
        rounds=3,
    )


def first_calls(small):
    """Yields LaMa's unit on a map that is transformed by matrix products."""
    channels, side = (6, 9) if small else (192, 64)
    unit, x = inr_kernels.FourierUnit(channels, channels).to(DEVICE), random_leaf(1, channels, side, side)
    yield functools.partial(unit, x), [x, *unit.parameters()]


def launches():
    """Yields Big-LaMa's unit at 512²: 1 x 1 convolution of 192 channels of 64 x 33 frequencies, and columns' DFT."""
    channels, height, half = 192, 64, 33
    spectrum = 8 * channels * height * half
    for dtype, unit, precision in (("bfloat16", "tf32", "tf32"), ("float32", "fp32", "ieee")):
        common = {"op": "fourier_unit", "kernel": "multiply", "mode": precision, "dtype": dtype, "unit": unit}
        parts = ("the product", 2 * channels, height * half, 1), ("the columns", 2 * height, half, channels)
        for nth, (name, side, columns, units) in enumerate(parts):
            yield Launch(
                nth=nth,
                case=f"{name}, {precision}",
                programs=units * math.ceil(side / 64) * math.ceil(columns / 64),
                trips=side / 32,
                bytes=2 * spectrum + 4 * side * side,
                flops=2 * units * side * side * columns,
                **common,
            )
