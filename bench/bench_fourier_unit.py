"""Fast Fourier convolution against LaMa's own arithmetic in PyTorch: its block, the unit in it, a training step.

The floor: a block's 3 x 3 convolutions make 82 % of its multiply-adds directly and 63 % by Winograd's F(2 x 2, 3 x 3),
which needs 4 instead of 9 a value; the rest are three products 1 x 1, one of them on the spectrum, and 2.5 n log2 n
a transform. `flops` counts the latter form, so that the fraction of the GEMM's rate is that of what has to be done.
"""

import functools
import math

import pytest
import torch
from torch import nn

from inr_kernels.fourier_unit import FFCResnetBlock

from .conftest import DEVICE

# Channels of both parts and sides of the map: Big-LaMa at 512² and 1024², the middle and first levels of IN² at 512².
SHAPES = {"cpu": [(512, 64), (512, 128), (128, 128), (64, 256)], "cuda": [(512, 64), (512, 128), (64, 256)]}[DEVICE]
IMPLEMENTATIONS = ["eager", "compile", "ours", "eager bf16", "ours bf16"]


def lama_unit(unit, x):
    """FourierUnit: the parts are stacked, permuted and copied before and after the convolution."""
    z = torch.fft.rfftn(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(-2, -1), norm="ortho")
    z = torch.stack((z.real, z.imag), -1).permute(0, 1, 4, 2, 3).contiguous()
    z = z.view(len(z), -1, *z.shape[3:]).to(x.dtype)
    z = torch.relu_(unit.bn(unit.conv_layer(z)))
    z = z.view(len(z), -1, 2, *z.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
    z = z.to(torch.promote_types(x.dtype, torch.float32))
    z = torch.complex(z[..., 0], z[..., 1])
    return torch.fft.irfftn(z, s=x.shape[2:], dim=(-2, -1), norm="ortho").to(x.dtype)


def lama_layer(layer, x_l, x_g):
    """FFC_BN_ACT: four convolutions, two sums, two norms, two ReLUs."""
    ffc, spectral = layer.ffc, layer.ffc.convg2g
    y = spectral.conv1(x_g)
    y = spectral.conv2(y + lama_unit(spectral.fu, y))
    out_l, out_g = ffc.convl2l(x_l) + ffc.convg2l(x_g), ffc.convl2g(x_l) + y
    return layer.act_l(layer.bn_l(out_l)), layer.act_g(layer.bn_g(out_g))


def lama_block(block, x_l, x_g):
    """FFCResnetBlock."""
    y_l, y_g = lama_layer(block.conv2, *lama_layer(block.conv1, x_l, x_g))
    return x_l + y_l, x_g + y_g


@functools.cache
def compiled_block():
    return torch.compile(lama_block)


def problem(channels, side, dtype):
    """A block in evaluation, with 3/4 of its channels global, and its input."""
    block = FFCResnetBlock(channels, "reflect", nn.BatchNorm2d, ratio_gin=0.75, ratio_gout=0.75, enable_lfu=False)
    x = [torch.randn(1, n, side, side, device=DEVICE).to(dtype).relu_() for n in (channels // 4, 3 * channels // 4)]
    return block.to(DEVICE, dtype).eval(), x


def flops(channels, side):
    """(the unit's, the layer's) in the cheapest form known."""
    local, glob = channels // 4, 3 * channels // 4
    half, pixels, spectrum = glob // 2, side * side, side * (side // 2 + 1)
    unit = 8 * half * half * spectrum + 2 * half * 2.5 * pixels * math.log2(pixels)
    layer = unit + 4 * glob * half * pixels + 8 * (local * local + 2 * local * glob) * pixels
    return unit, layer


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_block(measure, smoke, shape, implementation):
    channels, side = (16, 8) if smoke else shape
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    block, x = problem(channels, side, dtype)
    run = {
        "eager": lambda: lama_block(block, *x),
        "compile": lambda: compiled_block()(block, *x),
        "ours": lambda: block(tuple(x)),
    }[implementation.removesuffix(" bf16")]
    with torch.no_grad():
        measure(
            run,
            op="fourier_unit",
            case=f"FFC block, {channels} x {side}²",
            implementation=implementation,
            dtype=dtype,
            flops=2 * flops(channels, side)[1],
            small=True,
        )


@pytest.mark.parametrize("implementation", ["eager", "ours"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_unit(measure, smoke, shape, implementation):
    channels, side = (16, 8) if smoke else shape
    block, x = problem(channels, side, torch.float32)
    unit, x = block.conv1.ffc.convg2g.fu, x[1][:, : 3 * channels // 8].contiguous()
    with torch.no_grad():
        measure(
            (lambda: unit(x)) if implementation == "ours" else lambda: lama_unit(unit, x),
            op="fourier_unit",
            case=f"Fourier unit alone, {x.shape[1]} x {side}²",
            implementation=implementation,
            dtype=torch.float32,
            flops=flops(channels, side)[0],
            small=True,
        )


@pytest.mark.parametrize("implementation", ["eager", "ours"])
@pytest.mark.parametrize("training", [False, True], ids=["frozen", "training"])
def bench_backward(measure, smoke, training, implementation):
    """frozen: gradients of the input alone, through norms in evaluation, as feature refinement takes them."""
    channels, side = (16, 8) if smoke else SHAPES[0]
    block, x = problem(channels, side, torch.float32)
    block.train(training).requires_grad_(training)
    leaves = [part.requires_grad_() for part in x]

    def step():
        out = block(tuple(leaves)) if implementation == "ours" else lama_block(block, *leaves)
        torch.autograd.grad(sum(part.sum() for part in out), [*leaves, *(block.parameters() if training else ())])

    measure(
        step,
        op="fourier_unit",
        case=f"FFC block, {channels} x {side}², {'training step' if training else 'forward + gradient of the input'}",
        implementation=implementation,
        dtype=torch.float32,
        flops=2 * (3 if training else 2) * flops(channels, side)[1],
        rounds=3,
    )
