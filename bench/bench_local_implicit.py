"""local_implicit against LIIF's own arithmetic in PyTorch: forward, render and the training step.

The floor: after the hoist a query of LIIF's decoder costs 0.79 M multiply-adds (offsets and hidden layers for four
neighbours, the last Linear once), a pixel of the map 0.15 M. A training step that recomputes costs four times as much.
"""

import functools
import itertools

import pytest
import torch

from inr_kernels import LocalImplicitDecoder
from inr_kernels.local_implicit import op
from inr_kernels.local_implicit.functional import Form, hoist_features
from inr_kernels.local_implicit.reference import local_implicit, pixel_centres

from .conftest import DEVICE

HIDDEN, CHANNELS = (256,) * 4, 64
FORWARD = ["eager", "compile", "ours", "ours render", "eager bf16", "ours bf16", "ours render bf16"]
FORWARD += ["compile bf16", "ours mma bf16"] if DEVICE == "cuda" else []
FORWARD += ["ours wgmma bf16"] if DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0) else []
SHAPES = {"cpu": {"map": 64, "scale": 4, "batch": 16}, "cuda": {"map": 256, "scale": 4, "batch": 16}}[DEVICE]


def macs(queries, pixels):
    """Multiply-adds of LIIF's decoder after the hoist."""
    hidden = sum(a * b for a, b in itertools.pairwise(HIDDEN))
    return queries * (4 * (hidden + 4 * HIDDEN[0]) + HIDDEN[-1] * 3), pixels * HIDDEN[0] * CHANNELS * 9


def grid(n, device):
    """[1, n * n, 2]: the pixels of an n x n picture."""
    centres = pixel_centres(n).to(device)
    return torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).view(1, -1, 2)


def parameters(decoder):
    """The weights and biases of a decoder's Linear layers."""
    linears = list(decoder.imnet.layers)[::2]
    return [layer.weight for layer in linears], [layer.bias for layer in linears]


@functools.cache
def compiled_reference():
    return torch.compile(local_implicit)


@pytest.mark.parametrize("implementation", FORWARD)
def bench_forward(measure, smoke, implementation, monkeypatch):
    side, scale = (8, 2) if smoke else (SHAPES["map"], SHAPES["scale"])
    n = side * scale
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    decoder = LocalImplicitDecoder(CHANNELS, hidden=HIDDEN).to(DEVICE, dtype)
    feat = torch.randn(1, CHANNELS, side, side, device=DEVICE).to(dtype)
    coord, cell = grid(n, DEVICE), torch.full((1, 2), 2 / n, device=DEVICE)
    weights, biases = parameters(decoder)

    def query(backend=None):
        decoder._hoisted._entry = None  # each round pays for the whole
        return decoder(feat, coord, cell, backend=backend)

    whole = cell[:, None].expand(coord.shape)
    run = {
        "eager": lambda: local_implicit(feat, coord, whole, weights, biases),
        "compile": lambda: compiled_reference()(feat, coord, whole, weights, biases),
        "ours": query,
        "ours mma": lambda: query("cuda"),  # CUDA C++
        "ours wgmma": lambda: query("cuda"),
        "ours render": lambda: decoder.render(feat, (n, n)),
    }[implementation.removesuffix(" bf16")]
    cuda = op.cuda_backend("wgmma" if "wgmma" in implementation else "mma")
    monkeypatch.setitem(op.OP.backends, "cuda", cuda)
    with torch.no_grad():
        measure(
            run,
            op="local_implicit",
            case=f"forward, {side}² → {n}²",
            implementation=implementation,
            dtype=dtype,
            flops=2 * sum(macs(n * n, side * side)),
        )


def saved_bytes(step):
    """What autograd keeps between forward and backward, parameters aside."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


@pytest.mark.parametrize("implementation", ["eager", "compile", "ours"])
def bench_training_step(measure, smoke, implementation):
    batch, queries, side = (1, 40, 8) if smoke else (SHAPES["batch"], 2304, 48)
    decoder = LocalImplicitDecoder(CHANNELS, hidden=HIDDEN).to(DEVICE)
    feat = torch.randn(batch, CHANNELS, side, side, device=DEVICE, requires_grad=True)
    coord = torch.rand(batch, queries, 2, device=DEVICE) * 2 - 1
    cell = torch.full((batch, queries, 2), 2 / 150, device=DEVICE)
    decode = {"eager": local_implicit, "compile": compiled_reference()}.get(implementation)

    def step():
        if decode:
            out = decode(feat, coord, cell, *parameters(decoder))
        else:
            out = decoder(feat, coord, cell)
        out.abs().mean().backward()

    decoding, convolving = macs(batch * queries, batch * side * side)
    measure(
        step,
        op="local_implicit",
        case=f"training step, {batch} x {queries} queries on {side}²",
        implementation=implementation,
        dtype=torch.float32,
        flops=2 * (4 * decoding + 3 * convolving),  # forward, recomputation, and the two products of the backward
        rounds=3,
        saved_bytes=saved_bytes(step),
    )


@pytest.mark.parametrize("implementation", ["eager", "ours", *(["ours bf16"] if DEVICE == "cuda" else [])])
def bench_ensemble_first(measure, smoke, implementation):
    side, n = (4, 8) if smoke else (SHAPES["map"], 4 * SHAPES["map"])
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    decoder = LocalImplicitDecoder(
        CHANNELS, out_channels=64, hidden=(256, 256, 256), feat_unfold=False, ensemble_after="first"
    )
    decoder.to(DEVICE, dtype)
    form = Form(False, True, "first")
    feat, coord = torch.randn(1, CHANNELS, side, side, device=DEVICE).to(dtype), grid(n, DEVICE)
    cell, (weights, biases) = torch.full(coord.shape, 2 / n, device=DEVICE), parameters(decoder)

    def ours():
        decoder._hoisted._entry = None
        return decoder(feat, coord, cell)

    def eager():
        return local_implicit(feat, coord, cell, weights, biases, **form._asdict())

    with torch.no_grad():
        measure(
            eager if implementation == "eager" else ours,
            op="local_implicit",
            case=f"ensemble first (INRB), {side}² → {n}²",
            implementation=implementation,
            dtype=dtype,
            flops=2 * (n * n * (258 * 256 + 256 * 256 + 256 * 64 + 4 * 3 * 256) + side * side * 256 * CHANNELS),
        )


def bench_hoist(measure, smoke):
    side = 8 if smoke else SHAPES["map"]
    decoder = LocalImplicitDecoder(CHANNELS, hidden=HIDDEN).to(DEVICE)
    weights, biases = parameters(decoder)
    feat = torch.randn(1, CHANNELS, side, side, device=DEVICE)
    with torch.no_grad():
        measure(
            lambda: hoist_features(feat, weights[0], biases[0], Form()),
            op="local_implicit",
            case=f"the hoist alone, {side}²",
            implementation="ours",
            dtype=torch.float32,
            flops=2 * macs(0, side * side)[1],
        )
