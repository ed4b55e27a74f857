"""local_implicit against LIIF's own operations in PyTorch: forward, render and the training step; LTE's decoder.

The minimum work: after the hoist a query of LIIF's decoder costs 0.79 M multiply-adds (offsets and hidden layers for
four neighbours, the last Linear once), a pixel of the map 0.15 M. A training step that recomputes costs four times as
much.
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import inr_kernels
from inr_kernels import LocalImplicitDecoder, LocalTextureDecoder

from . import peers
from .conftest import DEVICE, random_leaf
from .launches import Launch, Native

HIDDEN, CHANNELS = (256,) * 4, 64
INRB = {"feat_unfold": False, "ensemble_after": "first"}
HOISTED = [f"hoisted, {peer}" for peer in peers.PEERS]
FORWARD = ["eager", "compile", *HOISTED, "ours", "ours render", "eager bf16", "ours bf16", "ours render bf16"]
FORWARD += ["hoisted, OpenVINO bf16"] if DEVICE == "cpu" else []
FORWARD += ["compile bf16", "ours mma bf16"] if DEVICE == "cuda" else []
FORWARD += ["ours wgmma bf16"] if DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0) else []
MAP = {"cpu": 64, "cuda": 256}[DEVICE]
SCALE, BATCH, QUERIES = 4, 16, 2304


def decoder_macs(queries):
    """Returns the multiply-adds of LIIF's decoder after the hoist."""
    hidden = sum(a * b for a, b in itertools.pairwise(HIDDEN))
    return queries * (4 * (hidden + 4 * HIDDEN[0]) + HIDDEN[-1] * 3)


def hoist_macs(pixels):
    """Returns the multiply-adds of the hoisted first layer."""
    return pixels * HIDDEN[0] * CHANNELS * 9


def grid(n):
    """Returns the pixel centres of an n x n image, [1, n * n, 2]."""
    centres = (2 * torch.arange(n, device=DEVICE) + 1) / n - 1
    return torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).view(1, -1, 2)


def parameters(decoder):
    """Returns the weights and the biases of a decoder's Linear layers."""
    linears = list(decoder.imnet.layers)[::2]
    return [layer.weight for layer in linears], [layer.bias for layer in linears]


def eager(*args, **options):
    from inr_kernels.local_implicit.reference import local_implicit

    return local_implicit(*args, **options)


@functools.cache
def compiled_reference():
    from inr_kernels.local_implicit.reference import local_implicit

    return torch.compile(local_implicit)


def compiled(*args):
    return compiled_reference()(*args)


def hoisted(feat, coord, cell, *parameters):
    """LIIF's decoder in PyTorch after its first layer was applied once per pixel, as a 3 x 3 convolution."""
    from inr_kernels.local_implicit.reference import decode

    weights, biases = parameters[: len(HIDDEN) + 1], parameters[len(HIDDEN) + 1 :]
    channels = feat.shape[1]
    first = weights[0][:, : 9 * channels].view(-1, channels, 3, 3)
    maps = F.conv2d(feat, first, biases[0], padding=1).permute(0, 2, 3, 1)
    (y, x), position_weight = coord[:, None].unbind(-1), weights[0][:, 9 * channels :]
    return decode(maps, y, x, cell[:, None], position_weight, weights[1:], biases[1:], feat.shape[2], 0, True, False)


@pytest.mark.parametrize("implementation", FORWARD)
def bench_forward(measure, smoke, implementation, monkeypatch):
    side, n = (8, 16) if smoke else (MAP, SCALE * MAP)
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    kind = implementation.removesuffix(" bf16")
    decoder = LocalImplicitDecoder(CHANNELS, hidden=HIDDEN).to(DEVICE, dtype)
    feat = torch.randn(1, CHANNELS, side, side, device=DEVICE).to(dtype)
    coord = grid(n)
    cell = torch.full(coord.shape, 2 / n, device=DEVICE)
    weights, biases = parameters(decoder)
    if kind in ("ours mma", "ours wgmma"):
        from inr_kernels.local_implicit import op

        monkeypatch.setitem(op.OP.backends, "cuda", op.cuda_backend(kind.removeprefix("ours ")))
    if kind in HOISTED:
        of_form = torch.float32 if implementation.endswith("bf16") else dtype
        form = peers.Form(hoisted, *(p.to(of_form) for p in (*weights, *biases)))
        peer = peers.take(kind.removeprefix("hoisted, "), form, (feat.to(of_form), coord, cell), dtype)
    # The function, not the module: the module would hoist once for all rounds.
    decode = {"eager": eager, "compile": compiled}.get(kind, inr_kernels.local_implicit_decode)
    backend = {"backend": "cuda"} if "mma" in kind else {}

    def run():
        if kind in HOISTED:
            return peer()
        if kind == "ours render":
            return decoder.render(feat, (n, n))
        return decode(feat, coord, cell, weights, biases, **backend)

    with torch.no_grad():
        measure(
            run,
            op="local_implicit",
            case=f"forward, {side}² → {n}²",
            implementation=implementation,
            dtype=dtype,
            flops=2 * (decoder_macs(n * n) + hoist_macs(side * side)),
        )


def saved_bytes(step):
    """Returns the bytes that autograd saves between forward and backward, parameters excluded."""
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
    batch, queries, side = (1, 40, 8) if smoke else (BATCH, QUERIES, 48)
    decoder = LocalImplicitDecoder(CHANNELS, hidden=HIDDEN).to(DEVICE)
    feat = torch.randn(batch, CHANNELS, side, side, device=DEVICE, requires_grad=True)
    coord = torch.rand(batch, queries, 2, device=DEVICE) * 2 - 1
    cell = torch.full((batch, queries, 2), 2 / 150, device=DEVICE)
    decode = {"eager": eager, "compile": compiled, "ours": inr_kernels.local_implicit_decode}[implementation]

    def step():
        decode(feat, coord, cell, *parameters(decoder)).abs().mean().backward()

    decoding, hoisting = decoder_macs(batch * queries), hoist_macs(batch * side * side)
    measure(
        step,
        op="local_implicit",
        case=f"training step, {batch} x {queries} queries on {side}²",
        implementation=implementation,
        dtype=torch.float32,
        flops=2 * (4 * decoding + 3 * hoisting),  # forward, recomputation, and the two products of the backward
        rounds=3,
        saved_bytes=saved_bytes(step),
    )


@pytest.mark.parametrize("implementation", ["eager", "ours", *(["ours bf16"] if DEVICE == "cuda" else [])])
def bench_ensemble_first(measure, smoke, implementation):
    side, n = (4, 8) if smoke else (MAP, 4 * MAP)
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    decoder = LocalImplicitDecoder(CHANNELS, out_channels=64, hidden=(256, 256, 256), **INRB).to(DEVICE, dtype)
    feat, coord = torch.randn(1, CHANNELS, side, side, device=DEVICE).to(dtype), grid(n)
    cell, (weights, biases) = torch.full(coord.shape, 2 / n, device=DEVICE), parameters(decoder)
    decode = eager if implementation == "eager" else inr_kernels.local_implicit_decode
    with torch.no_grad():
        measure(
            lambda: decode(feat, coord, cell, weights, biases, **INRB),
            op="local_implicit",
            case=f"ensemble first (INRB), {side}² → {n}²",
            implementation=implementation,
            dtype=dtype,
            flops=2 * (n * n * (258 * 256 + 256 * 256 + 256 * 64 + 4 * 3 * 256) + side * side * 256 * CHANNELS),
        )


@pytest.mark.parametrize("implementation", ["eager", "ours", "ours render", "eager bf16", "ours bf16"])
def bench_texture(measure, smoke, implementation):
    """LTE's decoder, without its convolutions and its skip connection but for `render`."""
    from inr_kernels.local_implicit.reference import decode_texture

    side, n, hidden = (4, 8, 32) if smoke else (MAP, SCALE * MAP, 256)
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    decoder = LocalTextureDecoder(CHANNELS, hidden=(hidden,) * 3, hidden_dim=hidden).to(DEVICE, dtype)
    coef, freq = torch.randn(2, 1, hidden, side, side, device=DEVICE).to(dtype)
    feat, image = torch.randn(1, CHANNELS, side, side, device=DEVICE).to(dtype), torch.rand(1, 3, side, side).to(coef)
    coord, (weights, biases) = grid(n), parameters(decoder)
    cell = torch.full(coord.shape, 2 / n, device=DEVICE)

    def eager_texture():
        texture = torch.cat((coef, freq[:, ::2], freq[:, 1::2]), 1).permute(0, 2, 3, 1).contiguous()
        y, x = coord.unsqueeze(1).unbind(-1)
        phase = decoder.phase.weight
        return decode_texture(texture, y, x, cell.unsqueeze(1), phase, weights, biases, side, 0, True)

    def run():
        if implementation.startswith("eager"):
            return eager_texture()
        if implementation == "ours render":
            return decoder.render(feat, (n, n), image=image)
        return inr_kernels.local_texture_decode(coef, freq, coord, cell, decoder.phase.weight, weights, biases)

    macs = n * n * (4 * (3 * hidden * hidden + 3 * hidden) + 3 * hidden)
    if implementation == "ours render":
        macs += side * side * 2 * hidden * CHANNELS * 9
    with torch.no_grad():
        measure(
            run,
            op="local_implicit",
            case=f"LTE's decoder, {side}² → {n}²",
            implementation=implementation,
            dtype=dtype,
            flops=2 * macs,
        )


class MLPBlock(torch.nn.Module):
    """x + MLP(LayerNorm(x)) of a transformer, in plain PyTorch."""

    def __init__(self, channels, inner):
        super().__init__()
        layers = torch.nn.Linear(channels, inner), torch.nn.GELU(), torch.nn.Linear(inner, channels)
        self.norm, self.layers = torch.nn.LayerNorm(channels), torch.nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(self.norm(x))


@pytest.mark.skipif(DEVICE == "cuda", reason="it is torch's layers on a GPU")
@pytest.mark.parametrize("implementation", ["eager", *peers.PEERS, "ours"])
def bench_mlp(measure, smoke, implementation):
    """Measures the MLP of IN2's attention blocks, on a map of 64²."""
    from inr_kernels.local_implicit import mlp

    rows, channels, inner = (33, 8, 16) if smoke else (64 * 64, 256, 1024)
    block, x = MLPBlock(channels, inner).eval(), torch.randn(1, rows, channels)
    weights, biases = zip(*((layer.weight, layer.bias) for layer in list(block.layers)[::2]), strict=True)
    norm = {"norm_weight": block.norm.weight, "norm_bias": block.norm.bias}
    with torch.no_grad():
        if implementation == "ours":
            run = functools.partial(mlp, x, weights, biases, add=x, **norm)
        elif implementation == "eager":
            run = functools.partial(block, x)
        else:
            run = peers.take(implementation, block, (x,))
        measure(
            run,
            op="local_implicit",
            case=f"mlp, {rows} rows, {channels} → {inner} → {channels}",
            implementation=implementation,
            dtype=torch.float32,
            flops=4 * rows * channels * inner,
        )


def bench_hoist(measure, smoke):
    from inr_kernels.local_implicit.functional import Form, hoist_features

    side = 8 if smoke else MAP
    weights, biases = parameters(LocalImplicitDecoder(CHANNELS, hidden=HIDDEN).to(DEVICE))
    feat = torch.randn(1, CHANNELS, side, side, device=DEVICE)
    with torch.no_grad():
        measure(
            lambda: hoist_features(feat, weights[0], biases[0], Form()),
            op="local_implicit",
            case=f"the hoist alone, {side}²",
            implementation="ours",
            dtype=torch.float32,
            flops=2 * hoist_macs(side * side),
        )


def first_calls(small):
    """Yields LIIF's decoder.

    small: also LTE's, and with the ensemble first; layer by layer (float32) and on chip (float16), there also with more
    than 128 channels, for which Hopper has a kernel of its own.
    """
    side, queries = (5, 70) if small else (256, 1 << 20)
    narrow, half, single = (32, 32), torch.float16, torch.float32
    forms = [(half, narrow), (single, narrow), (half, (32, 130))] if small else [(torch.bfloat16, HIDDEN)]
    cell = torch.full((1, 2), 1 / side, device=DEVICE)
    for (dtype, hidden), after in itertools.product(forms, ("last", "first") if small else ("last",)):
        decoder = LocalImplicitDecoder(CHANNELS, hidden=hidden, ensemble_after=after).to(DEVICE, dtype)
        feat, coord = random_leaf(1, CHANNELS, side, side), random_leaf(1, queries, 2).detach().tanh()
        yield lambda: decoder(feat.to(dtype), coord, cell), [feat, *decoder.parameters()]  # noqa: B023
    if small:
        texture = LocalTextureDecoder(CHANNELS, hidden=narrow, hidden_dim=32).to(DEVICE)
        yield lambda: texture(feat, coord, cell), [feat, *texture.parameters()]


def launches():
    """Yields LIIF's decoder, 256 x 4: 1 M queries on 256² pixels; and its training step, all its runs together."""
    width, depth, block = HIDDEN[0], len(HIDDEN) - 1, 128

    def decoding(queries, pixels):
        rows = 4 * queries
        moved = 2 * (pixels * width + 3 * queries) + 8 * queries  # map, colours, coordinates
        flops = 2 * decoder_macs(queries)
        return {"programs": math.ceil(rows / block), "trips": depth, "bytes": moved, "flops": flops}

    common = {"op": "local_implicit", "mode": "last", "dtype": "bfloat16"}
    case, whole = "1 M queries on 256²", decoding(1 << 20, 1 << 16)
    yield Launch(kernel="decode", case=case, **whole, **common)
    for tiles, shared in ((1, 48 << 10), (2, 160 << 10)):
        name = f"decodeILNS_4TypeE2ELi{width}ELb0ELi{tiles}E"
        cuda = common | whole | {"programs": whole["programs"] // tiles}
        cuda["native"] = Native(f"decode, mma.sync, {tiles} x 16 rows per warp", warps=8, shared=shared)
        yield Launch(kernel=name, case=case, **cuda)

    queries, pixels = BATCH * QUERIES, BATCH * 48 * 48
    rows, common["case"] = 4 * queries, "a step of 16 x 2304 queries on 48²"
    state, hidden = 2 * rows * width, 2 * rows * depth * width * width
    keeping = decoding(queries, pixels) | {"flops": hidden}
    keeping["bytes"] += (depth + 1) * state
    yield Launch(kernel="decode", nth=1, **keeping, **common)
    back = keeping | {"bytes": 2 * (depth + 1) * state + rows * (2 * 32 + 4)}
    yield Launch(kernel="backpropagate", **back, **common)
    tiles, splits, run = (width // 64) ** 2 * depth, 8, 15872  # rows of a run: what fits the workspace
    yield Launch(
        kernel="add_products",
        programs=tiles * splits * math.ceil(rows / run),
        trips=run / splits / 32,
        bytes=2 * depth * state,
        flops=hidden,
        **common,
    )
    first = common | {"mode": "first", "programs": queries // 64, "bytes": (1 + 1 / 4) * state + 36 * rows}
    # Four neighbours, each with a loop over 8 blocks of channels that holds two thirds of the instructions.
    yield Launch(kernel="blend_backward", trips=4 * (8 * 2 / 3 + 1 / 3), flops=0, **first)
    # LTE's: reads the gradient, writes those of coefficients, frequencies and phases; a loop over 4 blocks of channels.
    texture = common | {"mode": "texture", "programs": rows // 64, "bytes": 3.5 * state}
    yield Launch(kernel="texture_backward", trips=4, flops=0, **texture)
    moved = state + 20 * rows + 2 * 4 * pixels * width
    yield Launch(kernel="add_segments", programs=pixels, trips=1, bytes=moved, flops=0, **common)
