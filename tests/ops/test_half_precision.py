"""Convolutions and multi-layer perceptrons in half precision on processors where torch has only slow layers for it.

The C++ kernels compute them in float32; where torch is fast, it computes them (see the tests of the ops).
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inr_kernels
from inr_kernels import explain
from inr_kernels._core import backends
from inr_kernels.fourier_unit import FFCResnetBlock, FusedSequential, conv2d, conv3x3
from inr_kernels.local_implicit import mlp
from inr_kernels.models import LaMa, LaMaConfig
from inr_kernels.models.common.convolution import Conv3x3

pytestmark = pytest.mark.usefixtures("slow_half")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# name: (function, shapes of its tensors)
CALLS = {
    "conv3x3": (conv3x3, [(2, 36, 35, 34), (33, 36, 3, 3), (33,)]),
    "conv3x3, two inputs, sum and ReLU": (
        lambda x, weight, bias, other, add: conv3x3(x, weight, bias, other=other, add=add, relu=True),
        [(2, 20, 9, 11), (7, 32, 3, 3), (7,), (2, 12, 9, 11), (2, 7, 9, 11)],
    ),
    "conv3x3, few channels": (lambda *args: conv3x3(*args, padding="zeros"), [(1, 3, 5, 6), (4, 3, 3, 3)]),
    "conv3x3, transposed, odd sides": (
        lambda x, weight, bias, add: conv3x3(x, weight, bias, add=add, padding="reflect transposed"),
        [(2, 20, 9, 11), (7, 20, 3, 3), (7,), (2, 7, 9, 11)],
    ),
    "conv3x3, transposed, even sides": (
        lambda x, weight: conv3x3(x, weight, padding="reflect transposed"),
        [(2, 20, 8, 10), (7, 20, 3, 3)],
    ),
    "conv2d, a stride": (
        lambda x, weight, scale, add: conv2d(x, weight, scale=scale, add=add, stride=2, padding=3),
        [(2, 5, 9, 11), (6, 5, 7, 7), (6,), (2, 6, 5, 6)],
    ),
    "conv2d, transposed": (
        lambda *args: conv2d(*args, stride=2, padding=1, transposed=True, output_padding=1),
        [(1, 18, 24, 30), (18, 14, 3, 3), (14,)],
    ),
    "mlp": (
        lambda x, first, second, norm, add: mlp(x, [first, second], norm_weight=norm, add=add),
        [(300, 24), (40, 24), (24, 40), (24,), (300, 24)],
    ),
}


def tensors_of(name, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in CALLS[name][1]]


@DTYPES
@pytest.mark.parametrize("name", CALLS)
def test_is_the_result_in_float32(name, dtype):
    function, tensors = CALLS[name][0], tensors_of(name, dtype)
    with inr_kernels.backend("cpu"):
        out = function(*tensors)
        assert out.dtype == dtype and out.is_contiguous()
        assert torch.equal(out, function(*(t.float() for t in tensors)).to(dtype))


@DTYPES
@pytest.mark.parametrize("name", CALLS)
def test_gradients(name, dtype):
    """Of all tensors, in their dtype: the errors are at most twice those of torch's layers in it."""
    function, tensors = CALLS[name][0], tensors_of(name, dtype)
    grads = []
    for backend, own in (("cpu", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [t.to(own).requires_grad_() for t in tensors]
        with inr_kernels.backend(backend):
            out = function(*leaves)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            grads.append(torch.autograd.grad(out, leaves, weights.to(own)))
    for ours, theirs, exact in zip(*grads, strict=True):
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= max(2 * (theirs - exact).norm(), torch.finfo(dtype).eps * exact.norm())


@DTYPES
@pytest.mark.parametrize(("op", "name"), [(conv3x3, "conv3x3"), (conv2d, "conv2d, a stride")])
def test_is_the_default(op, name, dtype):
    x, weight, *_ = tensors_of(name, dtype)
    assert "cpu        runs  <- default" in explain(op, x, weight)
    assert torch.equal(op(x, weight), op(x, weight, backend="cpu"))


def test_empty_batches():
    x, weight = torch.ones(0, 20, 5, 6).bfloat16(), torch.ones(4, 20, 3, 3).bfloat16()
    assert conv3x3(x, weight).shape == conv2d(x, weight, padding=1).shape == (0, 4, 5, 6)
    assert mlp(torch.ones(0, 3).half(), [torch.ones(5, 3).half()], backend="cpu").dtype == torch.float16


def test_in_a_compiled_graph():
    x, weight, bias = tensors_of("conv3x3", torch.bfloat16)
    compiled = torch.compile(lambda x: conv3x3(x, weight, bias) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), conv3x3(x, weight, bias) + 1)


def networks():
    options = {"norm_layer": nn.BatchNorm2d, "enable_lfu": False}
    block = FFCResnetBlock(32, "reflect", ratio_gin=0.75, ratio_gout=0.75, **options)
    parts = torch.randn(2, 8, 18, 21), torch.randn(2, 24, 18, 21)
    layers = nn.ReflectionPad2d(1), nn.Conv2d(18, 20, 3, 2), nn.BatchNorm2d(20), nn.ReLU()
    image = torch.rand(1, 4, 40, 56)
    return {
        "kept FFC layers": (block, (parts,)),
        "FusedSequential": (FusedSequential(*layers), (torch.randn(2, 18, 25, 31),)),
        "Conv3x3": (Conv3x3(20, 24), (torch.randn(2, 20, 25, 31),)),
        "LaMa": (LaMa(LaMaConfig(features=16, blocks=2)).model, (image,)),
    }


def convert(value, dtype):
    return tuple(convert(part, dtype) for part in value) if isinstance(value, tuple) else value.to(dtype)


@DTYPES
@pytest.mark.parametrize("name", ["kept FFC layers", "FusedSequential", "Conv3x3", "LaMa"])
@torch.no_grad()
def test_networks(name, dtype, monkeypatch):
    """No convolution is torch's; the errors are at most twice those of torch; changes of the weights are noticed."""
    model, x = networks()[name]
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    model.eval().requires_grad_(False).to(dtype)
    x = convert(x, dtype)
    for _ in range(2):
        with monkeypatch.context() as patch:
            for function in ("conv2d", "conv_transpose2d", "batch_norm"):
                patch.setattr(F, function, lambda *_, **__: pytest.fail("torch's layers were called"))
            out = model(*x)
        with monkeypatch.context() as patch:
            patch.setenv("INR_KERNELS_BACKEND", "reference")
            eager = model(*x)
        exact = model.double()(*convert(x, torch.double))
        model.to(dtype)
        for ours, theirs, true in zip(*map(_parts, (out, eager, exact)), strict=True):
            assert ours.dtype == dtype
            assert (ours - true).norm() <= 2 * (theirs - true).norm()
        next(model.parameters()).data.mul_(-1)  # for the second round
    assert all(not torch.equal(*pair) for pair in zip(*map(_parts, (out, model(*x))), strict=True))


def _parts(out):
    return out if isinstance(out, tuple) else (out,)


LAYERS = {
    "conv3x3": (lambda: Conv3x3(20, 24), (sys.modules["inr_kernels.fourier_unit.op.conv3x3"], "_prepared")),
    "conv2d": (
        lambda: FusedSequential(nn.Conv2d(20, 24, 7, padding=3)),
        (sys.modules["inr_kernels.fourier_unit.op.conv2d"].NativeConv2d, "prepare"),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_transformed_weights_are_kept(name, monkeypatch):
    make, (owner, function) = LAYERS[name]
    original, seen = getattr(owner, function), []
    monkeypatch.setattr(owner, function, lambda *args: seen.append(args) or original(*args))
    layer, x = make().bfloat16().requires_grad_(False), torch.randn(2, 20, 25, 31).bfloat16()
    outs = [layer(x), layer(x)]
    assert len(seen) == 1 and torch.equal(*outs)
    next(layer.parameters()).data.mul_(-1)
    assert not torch.equal(outs[0], layer(x)) and len(seen) == 2


@DTYPES
def test_gradient_of_the_input_of_constant_layers(dtype):
    block, (x,) = networks()["kept FFC layers"]
    block.eval().requires_grad_(False)
    grads = []
    for backend, own in (("cpu", dtype), ("reference", torch.float64)):
        leaves = [part.to(dtype).to(own).requires_grad_() for part in x]
        with inr_kernels.backend(backend):
            out = block.to(dtype).to(own)(tuple(leaves))
            grads.append(torch.autograd.grad(sum(part.double().square().sum() for part in out), leaves))
    for ours, exact in zip(*grads, strict=True):
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()  # a ReLU may get another sign


def test_torch_without_onednn_is_slow(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert backends._is_slow(torch.bfloat16) and backends._is_slow(torch.float16)


def test_torch_that_does_not_say_is_fast(monkeypatch):
    """The functions that tell are not public."""
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert not backends._is_slow(torch.bfloat16)
