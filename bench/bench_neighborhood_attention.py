"""neighborhood_attention of one to three axes against dense attention, its best forms in PyTorch, and NATTEN.

Eager is `scaled_dot_product_attention` of every pixel with every pixel: the cost of these tokens without neighborhoods.
"unfold" attends to windows that are views of the keys.

Cross-scale attention is that of NAF and AnyUp, whose keys have a lower resolution than the queries. There eager attends
to keys and values that are repeated to the queries' size, by `unfold` with a dilation of the ratio, and "residues" is
what one can do without cross-scale kernels: a batch of the queries of each residue modulo the ratio, with one map of
keys for all, and for AnyUp every head's output, then their mean.

The minimum memory traffic: query, key, value and output once, 2 KB per token of 8 heads x 32 in half precision;
backward: these, the gradients of all four, the log-sum-exp and the like.
"""

import functools
import importlib.util
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import inr_kernels

from .conftest import DEVICE, random_leaf
from .launches import Launch, Native


class Shape(NamedTuple):
    """Shape of the tokens [B, ..., heads, dim] of one to three axes, and the neighborhood."""

    batch: int
    size: tuple[int, ...]
    heads: int
    dim: int
    kernel_size: int
    dilation: int

    def __str__(self):
        size = " x ".join(map(str, (self.batch, *self.size)))
        return f"{size}, {self.heads} heads x {self.dim}, K {self.kernel_size}"


SMOKE_SIZE = 7, 6, 9  # as many of them as the shape has axes
SHAPES = {
    "cpu": [
        *(Shape(1, (64, 64), 8, 32, 7, 1), Shape(1, (64, 64), 8, 32, 7, 9), Shape(4, (28, 28), 4, 32, 7, 1)),
        *(Shape(1, (4096,), 8, 32, 31, 1), Shape(1, (8, 16, 16), 4, 32, 5, 1)),
    ],
    "cuda": [
        *(Shape(1, (64, 64), 8, 32, 7, 1), Shape(16, (64, 64), 8, 32, 7, 1), Shape(16, (64, 64), 8, 32, 7, 9)),
        *(Shape(4, (16384,), 8, 32, 63, 1), Shape(4, (16, 32, 32), 8, 32, 5, 1)),
    ],
}[DEVICE]
IMPLEMENTATIONS = ["eager", "unfold, compile", "flex_attention", "ours"]
IMPLEMENTATIONS += ["eager bf16", "unfold, compile bf16", "ours bf16"]
IMPLEMENTATIONS += ["compile", "compile bf16"] if DEVICE == "cuda" else []
IMPLEMENTATIONS += ["natten", "natten bf16"] if importlib.util.find_spec("natten") else []


def unpacked(qkv):
    """query, key, value [B, heads, tokens, dim] of qkv [B, ..., 3, heads, dim]."""
    return (t.flatten(1, -3).transpose(1, 2) for t in qkv.unbind(-3))


def packed_like(out, qkv):
    """out [B, heads, tokens, dim] as [B, ..., heads, dim]."""
    return out.transpose(1, 2).reshape(qkv.shape[:-3] + qkv.shape[-2:])


def dense(qkv, kernel_size, dilation):
    """Attends from every pixel to every pixel."""
    return packed_like(F.scaled_dot_product_attention(*unpacked(qkv)), qkv)


def unfold(qkv, kernel_size, dilation):
    """Attends to windows that are views of the keys and the values, by `Tensor.unfold`."""
    query, key, value = qkv.unbind(-3)
    rank = query.dim() - 3
    at = [_starts(n, kernel_size, dilation).to(qkv.device) for n in query.shape[1:-2]]
    at = [t.view(-1, *[1] * (rank - 1 - axis)) for axis, t in enumerate(at)]
    for axis in range(1, rank + 1):
        reach = (kernel_size - 1) * dilation + 1
        key, value = (t.unfold(axis, reach, 1)[..., ::dilation] for t in (key, value))
    key, value = (t[(slice(None), *at)] for t in (key, value))  # [B, ..., heads, dim, K, ...]
    near = key.flatten(rank + 3)
    scores = torch.einsum("...d,...dk->...k", query * query.shape[-1] ** -0.5, near)
    return torch.einsum("...k,...dk->...d", scores.softmax(-1), value.flatten(rank + 3))


def _starts(length, kernel_size, dilation):
    """The first key of each query's window."""
    from inr_kernels.neighborhood_attention.reference import window

    return window(length, kernel_size, dilation, 1, False)[0][:, 0]


@functools.cache
def compiled_unfold():
    return torch.compile(unfold)


@functools.cache
def compiled_flex(size, kernel_size, dilation=1, ratio=1):
    """flex_attention of [B, heads, tokens, dim] with the neighborhood as its block mask; size: of the keys."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(batch, head, query, key):
        seen = query >= 0
        for n in reversed(size):
            at = query % (n * ratio) // ratio  # and by formula: on a CPU, a mask cannot read a tensor of starts
            last = (n - at % dilation + dilation - 1) // dilation - kernel_size
            start = torch.minimum((at // dilation - kernel_size // 2).clamp(min=0), last)
            step = key % n - at % dilation - start * dilation
            seen = seen & (step >= 0) & (step < kernel_size * dilation) & (step % dilation == 0)
            query, key = query // (n * ratio), key // n
        return seen

    keys = math.prod(size)
    mask = create_block_mask(near, None, None, keys * ratio ** len(size), keys, device=DEVICE)
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def flex(qkv, *window):
    """Attends by flex_attention."""
    return packed_like(compiled_flex(qkv.shape[1:-3], *window)(*unpacked(qkv)), qkv)


@functools.cache
def compiled_dense():
    return torch.compile(dense)


def compiled(qkv, kernel_size, dilation):
    return compiled_dense()(qkv, kernel_size, dilation)


def ours(qkv, kernel_size, dilation):
    if qkv.dim() == 6:
        return inr_kernels.neighborhood_attention_2d_packed(qkv, kernel_size, dilation=dilation)
    attend = inr_kernels.neighborhood_attention_1d if qkv.dim() == 5 else inr_kernels.neighborhood_attention_3d
    return attend(*qkv.unbind(-3), kernel_size, dilation=dilation)


def natten(qkv, kernel_size, dilation):
    """Attends with NATTEN, which selects one of its backends."""
    from natten import na1d, na2d, na3d

    attend = (na1d, na2d, na3d)[qkv.dim() - 5]
    return attend(*qkv.unbind(-3), kernel_size=kernel_size, dilation=dilation)


RUNS = {
    "eager": dense,
    "compile": compiled,
    "unfold, compile": lambda qkv, *window: compiled_unfold()(qkv, *window),
    "flex_attention": flex,
    "ours": ours,
    "natten": natten,
}


without_warning = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # in smoke tests


@without_warning
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape}, dilation {shape.dilation}")
def bench_attention(measure, smoke, shape, gradients, implementation):
    if smoke:
        shape = Shape(1, SMOKE_SIZE[: len(shape.size)], 2, 4, 3, 2)
    if gradients and implementation == "flex_attention" and DEVICE == "cpu":
        pytest.skip("flex_attention has no backward on a CPU")
    batch, size, heads, dim, kernel_size, dilation = shape
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    qkv = torch.randn(batch, *size, 3, heads, dim, device=DEVICE).to(dtype).requires_grad_(gradients)
    grad = torch.randn(batch, *size, heads, dim, device=DEVICE).to(dtype)
    run = RUNS[implementation.removesuffix(" bf16")]

    def step():
        out = run(qkv, kernel_size, dilation)
        if gradients:
            torch.autograd.grad(out, qkv, grad)

    measure(
        step,
        op="neighborhood_attention",
        case=f"{'forward+backward' if gradients else 'forward'}, {shape}, dilation {dilation}",
        implementation=implementation,
        dtype=dtype,
        bytes=(12 if gradients else 4) * grad.numel() * grad.element_size(),
        small=batch == 1,
    )


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name.split()[0] in ("ours", "natten")])
def bench_module(measure, smoke, implementation):
    """Measures module against module, with both projections, on the first shape."""
    shape = Shape(1, SMOKE_SIZE[:2], 2, 4, 3, 2) if smoke else SHAPES[0]
    dtype = torch.bfloat16 if implementation.endswith("bf16") else torch.float32
    if implementation.startswith("natten"):
        from natten import NeighborhoodAttention2D
    else:
        from inr_kernels import NeighborhoodAttention2D
    channels = shape.heads * shape.dim
    layer = NeighborhoodAttention2D(channels, shape.heads, shape.kernel_size, dilation=shape.dilation)
    layer.to(DEVICE, dtype)
    x = torch.randn(shape.batch, *shape.size, channels, device=DEVICE).to(dtype)
    with torch.no_grad():
        measure(
            lambda: layer(x),
            op="neighborhood_attention",
            case=f"module, {shape}",
            implementation=implementation,
            dtype=dtype,
            bytes=10 * x.numel() * x.element_size(),  # input, qkv, attended values written and read, output
            small=shape.batch == 1,
        )


class CrossScale(NamedTuple):
    """Sides of query and key, heads of query and value, channels of both, the window."""

    name: str
    size: int
    key_size: int
    heads: int
    value_heads: int
    dim: int
    value_dim: int
    kernel_size: int

    def __str__(self):
        return f"{self.name}, {self.key_size}² to {self.size}², {self.value_dim} channels"

    def tensors(self):
        """query, key, value."""
        n, m = self.size, self.key_size
        shapes = (n, n, self.heads, self.dim), (m, m, self.heads, self.dim), (m, m, self.value_heads, self.value_dim)
        return [torch.randn(1, *shape, device=DEVICE) for shape in shapes]


CROSS_SCALES = [
    *(CrossScale("NAF", 64, 32, 4, 4, 64, 96, 9), CrossScale("NAF", 64, 16, 4, 4, 64, 96, 9)),
    CrossScale("AnyUp", 128, 16, 4, 1, 32, 384, 3),
]
SMOKE_CROSS_SCALES = [CrossScale("NAF", 8, 4, 2, 2, 4, 6, 3)] * 2 + [CrossScale("AnyUp", 8, 4, 2, 1, 4, 6, 3)]


def cross_scale(query, key, value, kernel_size):
    """Attends without repeated keys, heads or values."""
    mean = value.shape[3] < query.shape[3]
    return inr_kernels.neighborhood_attention_2d(query, key, value, kernel_size, mean_heads=mean)


def residues(query, key, value, kernel_size):
    """Attends in a batch of the queries of each residue, all with the same keys."""
    _, size, _, heads, _ = query.shape
    n = key.shape[1]
    ratio = size // n
    classes = query.view(n, ratio, n, ratio, heads, -1).permute(1, 3, 0, 2, 4, 5).flatten(0, 1)
    key, value = (t.expand(len(classes), -1, -1, heads, -1) for t in (key, value))
    out = inr_kernels.neighborhood_attention_2d(classes, key, value, kernel_size)
    out = out.view(ratio, ratio, n, n, heads, -1).permute(2, 0, 3, 1, 4, 5).reshape(1, size, size, heads, -1)
    return out


def unfolded(query, key, value, kernel_size):
    """Attends in plain PyTorch, to keys and values repeated to the size of the queries."""
    from inr_kernels.neighborhood_attention.reference import window

    _, size, _, heads, dim = query.shape
    n = key.shape[1]
    at = window(n, kernel_size, 1, 1, False)[0].to(query.device).repeat_interleave(size // n, 0)
    rows, columns = at[:, None, :, None], at[None, :, None, :]
    near, near_values = (t[0][rows, columns].flatten(2, 3) for t in (key, value))
    scores = torch.einsum("yxhd,yxkhd->yxhk", query[0] * dim**-0.5, near)
    weights = scores.softmax(-1)
    if value.shape[3] < heads:
        return torch.einsum("yxk,yxkd->yxd", weights.mean(2), near_values[:, :, :, 0])[None]
    return torch.einsum("yxhk,yxkhd->yxhd", weights, near_values)[None]


@functools.cache
def compiled_unfolded():
    return torch.compile(unfolded)


def cross_scale_flex(query, key, value, kernel_size):
    """Attends by flex_attention, whose mask finds a query's position among the keys."""
    size, heads = key.shape[1:3], query.shape[3]
    attend = compiled_flex(tuple(size), kernel_size, ratio=query.shape[1] // size[0])
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    out = attend(query, key, value.expand(-1, heads, -1, -1))
    return out.transpose(1, 2)


CROSS_SCALE_RUNS = {
    "eager": unfolded,
    "unfold, compile": lambda *inputs: compiled_unfolded()(*inputs),
    "flex_attention": cross_scale_flex,
    "residues": residues,
    "ours": cross_scale,
}


@without_warning
@pytest.mark.parametrize("implementation", CROSS_SCALE_RUNS)
@pytest.mark.parametrize("number", range(len(CROSS_SCALES)), ids=map(str, CROSS_SCALES))
def bench_cross_scale(measure, smoke, number, implementation):
    shape = (SMOKE_CROSS_SCALES if smoke else CROSS_SCALES)[number]
    tensors, run = shape.tensors(), CROSS_SCALE_RUNS[implementation]

    def step():
        out = run(*tensors, shape.kernel_size)
        return out.mean(-2) if out.shape[-2] == shape.heads > shape.value_heads else out

    written = step().numel()
    with torch.no_grad():
        measure(
            step,
            op="neighborhood_attention",
            case=f"cross-scale, {shape}",
            implementation=implementation,
            dtype=torch.float32,
            bytes=4 * (sum(t.numel() for t in tensors) + written),
            small=False,
        )


def first_calls(small):
    """Yields IN²'s attention: packed, with a bias; small: also with a window whose bias has a kernel of its own."""
    forms = [((7, 19), 2, 8, 3), ((17, 17), 1, 8, 17)] if small else [((64, 64), 8, 32, 7)]
    for size, heads, dim, kernel in forms:
        qkv, rpb = random_leaf(1, *size, 3, heads, dim), random_leaf(heads, 2 * kernel - 1, 2 * kernel - 1)
        yield functools.partial(inr_kernels.neighborhood_attention_2d_packed, qkv, kernel, rpb=rpb), [qkv, rpb]
    leaves = [random_leaf(1, n, n, heads, 32) for n, heads in ((8 if small else 64, 4), (4 if small else 16, 4))]
    leaves.append(random_leaf(1, *leaves[1].shape[1:3], 1, 384))
    yield functools.partial(inr_kernels.neighborhood_attention_2d, *leaves, 3, mean_heads=True), leaves


def cuda_launches(kernel, trips, common, moved, flops, more=0):
    """Yields the launch of a kernel in CUDA C++. more: bytes of shared memory besides the stage of 14 rows."""
    native = Native(f"{kernel}, mma.sync", warps=4, shared=2 * 14 * 16 * 64 + more, loop="inner")
    given = common | {"programs": common["programs"] // 2, "bytes": moved, "flops": flops, "native": native}
    yield Launch(kernel=f"{kernel}ILNS_4TypeE2ELi32E", trips=trips, **given)


def launches():
    """Yields IN²'s attention: sixteen maps of 64², 8 heads x 32, K 7.

    A tile of 4 x 8 queries reads 10 rows of 14 columns: one block of 16 columns per row. In CUDA C++ a warp of 2 x 8
    queries reads 8 rows, in the forward two at a time, in the backward twice; the loops that copy the 14 rows of the
    block are counted once, and the first pass of the backward like the second.
    """
    batch, pixels, heads, dim, kernel = 16, 64 * 64, 8, 32, 7
    pairs, plane = batch * pixels * heads * kernel**2, 2 * batch * pixels * heads * dim
    numbers = 4 * batch * pixels * heads  # the log-sum-exp and the like, float32
    common = {"op": "neighborhood_attention", "mode": "dim 32", "dtype": "bfloat16", "case": "16 x 64², 8 x 32, K 7"}
    common |= {"programs": batch * pixels // 32 * heads}
    product = 2 * pairs * dim
    yield Launch(kernel="attend", trips=10, bytes=4 * plane + numbers, flops=2 * product, **common)
    yield from cuda_launches("attend", 4, common, 4 * plane + numbers, 2 * product)
    common["case"] += ", backward"
    shares = 4 * common["programs"] * (2 * kernel - 1) ** 2  # of the bias gradient, read once more by their sum
    moved = 5 * plane + 3 * numbers + shares
    yield Launch(kernel="query_backward", trips=20, bytes=moved, flops=3 * product, **common)
    yield Launch(kernel="key_value_backward", trips=10, bytes=6 * plane + 2 * numbers, flops=4 * product, **common)
    moved -= shares // 2  # twice as many queries in a tile
    sums = 4 * 4 * ((2 * kernel - 1) ** 2 + 16 * 18)
    yield from cuda_launches("query_backward", 16, common, moved, 3 * product, sums)
    yield from cuda_launches("key_value_backward", 8, common, 6 * plane + 2 * numbers, 4 * product, 16 * 16 * 8)
    cross = common | {"mode": "AnyUp", "case": "16 x 16² to 64², 4 x 32, 384 channels, K 9", "programs": 16 * 256 * 3}
    queries, keys = 16 * 64 * 64, 16 * 16 * 16
    tokens = 2 * (384 + 4 * 32) * (queries + keys) + 4 * 4 * queries
    flops = 2 * queries * 81 * (4 * 32 + 384)
    yield Launch(kernel="attend_mean", trips=9, bytes=tokens, flops=flops, **cross)
    wide = common | {"mode": "K 17", "case": "16 x 64², 8 x 32, K 17, backward"}
    wide |= {"programs": batch * pixels // 4096 * heads * 33 * 33}
    yield Launch(kernel="bias_backward", trips=32, bytes=4 * plane + 2 * numbers, flops=0, **wide)
