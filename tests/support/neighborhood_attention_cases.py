"""Random problems for the tests of neighborhood_attention, their tolerances, and the Triton launches to compile."""

import itertools
import math
from dataclasses import dataclass, field

import torch

from inr_kernels import neighborhood_attention_2d, neighborhood_attention_2d_packed, neighborhood_attention_3d
from inr_kernels.neighborhood_attention import triton_kernels

# Tests that reach every loop and border of the C++: test_sanitizers.py runs them.
SANITIZED = ["test_as_accurate", "gradcheck_through", "checks_bounds", "extreme", "nan_and", "empty", "needed_gradient"]

SHAPES = {
    "one pixel": {"size": (1, 1), "kernel_size": 1},
    "one row": {"size": (1, 40), "kernel_size": (1, 7)},
    "one column": {"size": (40, 1), "kernel_size": (7, 1)},
    "whole vectors": {"size": (7, 32), "kernel_size": 7},
    "wide": {"size": (5, 130), "kernel_size": (3, 9), "heads": 1},
    "tall": {"size": (67, 6), "kernel_size": (5, 3), "heads": 1},
    "dim 1": {"dim": 1},
    "dim 19": {"dim": 19, "kernel_size": 5},
    "dim 24": {"dim": 24, "heads": 3},
    "dim 70": {"dim": 70, "heads": 1, "batch": 1},
    "K 2": {"kernel_size": 2},
    "K 4 x 6": {"kernel_size": (4, 6)},
    "K 9": {"kernel_size": 9, "size": (11, 23), "heads": 1},
    "K 1 x 1": {"kernel_size": 1},
    "dilation 2 x 3": {"dilation": (2, 3), "size": (9, 23)},
    "dilation 9": {"dilation": 9, "kernel_size": 2, "size": (19, 22)},
    "largest dilation": {"dilation": (3, 6), "size": (9, 20)},
    "stride 2": {"kernel_size": 5, "stride": 2},
    "stride 3 x 2": {"kernel_size": (5, 4), "stride": (3, 2), "dilation": (1, 2)},
    "stride K": {"kernel_size": (3, 6), "stride": (3, 6)},
    "causal": {"is_causal": True, "kernel_size": 5},
    "causal rows": {"is_causal": (True, False), "kernel_size": 4, "stride": 2, "dilation": 2},
    "causal columns": {"is_causal": (False, True), "kernel_size": (3, 7), "stride": (1, 4)},
    "scale": {"scale": 2.5},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -0.3},
    "heads first": {"layout": "heads first"},
    "dim first": {"layout": "dim first", "dim": 5},
    "packed": {"layout": "packed", "kernel_size": 5},
    "wide values": {"dim": 5, "dim_v": 37, "kernel_size": 5},
    "narrow values": {"dim": 33, "dim_v": 3, "heads": 1, "dilation": (1, 2)},
    "grouped heads": {"heads": 4, "shared": (2, 2), "kernel_size": (3, 5)},
    "one head of keys and values": {"heads": 3, "shared": (1, 1), "size": (19, 21), "batch": 1},
    "shared values": {"heads": 4, "shared": (4, 1), "dim_v": 11, "stride": 2},
    "shared keys": {"heads": 6, "shared": (2, 3), "is_causal": True, "size": (5, 20), "batch": 1},
    "ratio 2 x 3": {"size": (12, 21), "key_size": (6, 7), "kernel_size": (3, 5), "dim_v": 19},
    "ratio 1 x 4": {"size": (5, 40), "key_size": (5, 10), "heads": 4, "shared": (2, 1), "kernel_size": 4},
    "ratio 17": {"size": (51, 68), "key_size": (3, 4), "heads": 1, "batch": 1},
    "ratio 2, dilation and stride": {"size": (18, 20), "key_size": (9, 10), "dilation": (2, 3), "stride": 2},
    "ratio 3, causal": {"size": (15, 21), "key_size": (5, 7), "is_causal": (True, False), "dim": 5, "batch": 1},
    "all keys of any size": {"size": (3, 13), "key_size": (7, 5), "kernel_size": (7, 5)},
    "mean": {"heads": 4, "shared": (4, 1), "mean_heads": True, "dim_v": 21, "kernel_size": (3, 4)},
    "mean, ratio 4": {
        **{"size": (20, 24), "key_size": (5, 6), "heads": 6, "shared": (2, 1), "mean_heads": True},
        **{"dim_v": 40, "batch": 1},
    },
    "volume": {"size": (4, 5, 18), "kernel_size": (3, 3, 5), "heads": 1},
    "volume, dilation, stride, causal": {
        **{"size": (6, 7, 9), "kernel_size": (3, 2, 4), "dilation": (2, 3, 2), "stride": (2, 1, 3), "batch": 1},
        "is_causal": (True, False, True),
    },
    "volume, shared heads": {"size": (4, 3, 17), "heads": 4, "shared": (2, 1), "dim_v": 11, "batch": 1},
    "volume of one plane": {"size": (1, 6, 9), "kernel_size": (1, 3, 4), "layout": "heads first"},
}


@dataclass
class Case:
    """An attention problem in float64, cast to the dtype under test."""

    batch: int = 2
    size: tuple = (9, 20)
    heads: int = 2
    dim: int = 8
    kernel_size: int | tuple = 3
    dilation: int | tuple = 1
    stride: int | tuple = 1
    is_causal: bool | tuple = False
    scale: float | None = None
    bias: bool = False
    layout: str = "contiguous"
    dim_v: int | None = None  # None: dim
    shared: tuple | None = None  # heads of key and value; None: heads
    key_size: tuple | None = None  # None: size
    mean_heads: bool = False
    tensors: tuple = field(default=())

    def __post_init__(self):
        qkv = torch.randn(self.batch, *self.size, 3, self.heads, self.dim, dtype=torch.float64)
        kernel = (self.kernel_size,) * len(self.size) if isinstance(self.kernel_size, int) else self.kernel_size
        rpb = torch.randn(self.heads, *(2 * k - 1 for k in kernel), dtype=torch.float64) if self.bias else None
        self.tensors = qkv, rpb

    def separate(self):
        """query, key, value."""
        query, key, value = self.tensors[0].unbind(-3)
        if self.dim_v is None and self.shared is None and self.key_size is None:
            return query, key, value
        size = self.key_size or self.size
        shared, dims = self.shared or (self.heads, self.heads), (self.dim, self.dim_v or self.dim)
        generator = torch.Generator(query.device).manual_seed(0)
        options = {"dtype": query.dtype, "device": query.device, "generator": generator}
        shapes = [(self.batch, *size, heads, dim) for heads, dim in zip(shared, dims, strict=True)]
        return query, *(torch.randn(shape, **options) for shape in shapes)

    def options(self):
        names = "dilation", "stride", "is_causal", "scale"
        return {name: getattr(self, name) for name in names} | ({"mean_heads": True} if self.mean_heads else {})

    def laid_out(self, tensor):
        """[B, ..., heads, dim] in the memory order under test."""
        if self.layout == "heads first":  # [B, heads, ..., dim], permuted
            return tensor.movedim(-2, 1).contiguous().movedim(1, -2)
        if self.layout == "dim first":
            return tensor.movedim(-1, 1).contiguous().movedim(1, -1)
        return tensor.contiguous()

    def forward(self, dtype, backend, rounded=torch.float64):
        """out, lse, and the inputs: query, key and value, or the packed tensor; and, if there is one, rpb.

        rounded: the dtype to round the inputs to first, so that float64 starts from the values under test.
        """
        qkv, rpb = self.tensors
        leaves = [self.laid_out(t.to(rounded).to(dtype)).requires_grad_() for t in self.separate()]
        if self.layout == "packed":
            leaves = [qkv.to(rounded).to(dtype).requires_grad_()]
        if rpb is not None:
            rpb = rpb.float().to(dtype).requires_grad_()
        attend = neighborhood_attention_2d if len(self.size) == 2 else neighborhood_attention_3d
        attend = neighborhood_attention_2d_packed if self.layout == "packed" else attend
        out, lse = attend(*leaves, self.kernel_size, rpb=rpb, **self.options(), return_lse=True, backend=backend)
        return out, lse, leaves if rpb is None else [*leaves, rpb]

    def run(self, dtype, backend, rounded=torch.float64):
        """out, lse and the gradients of (out * g).sum() + (lse * h).sum(), with fixed random g, h.

        With respect to query, key, value and, if there is one, rpb. rounded: see `forward`.
        """
        out, lse, inputs = self.forward(dtype, backend, rounded)
        generator = torch.Generator(out.device).manual_seed(1)
        grads = [
            torch.randn(t.shape, dtype=torch.float64, device=t.device, generator=generator).to(rounded)
            for t in (out, lse)
        ]
        results = torch.autograd.grad(
            (out, lse), inputs, [g.to(t.dtype) for g, t in zip(grads, (out, lse), strict=True)]
        )
        if self.layout == "packed":
            results = *results[0].unbind(3), *results[1:]
        return [out.detach(), lse.detach(), *results]


def assert_kernel_as_accurate(case, dtype, backend):
    """Asserts that each error against float64 is at most twice eager's in the same dtype, or a few roundings.

    Measured in the largest element and in relative norm. The scale is that of the exact result, but at least one, that
    of its summands: the gradient of a query whose window is one pixel is exactly zero by cancellation.
    """
    truth = case.run(torch.float64, "reference", rounded=dtype)
    assert_as_accurate(case.run(dtype, backend), case.run(dtype, "reference"), truth, dtype)


def assert_forward_as_accurate(case, dtype, backend):
    """`assert_kernel_as_accurate` of out and lse alone."""
    with torch.no_grad():
        truth = case.forward(torch.float64, "reference", rounded=dtype)[:2]
        kernel, eager = (case.forward(dtype, name)[:2] for name in (backend, "reference"))
    assert_as_accurate(kernel, eager, truth, dtype)


def assert_as_accurate(results, eager, truth, dtype):
    """`assert_kernel_as_accurate` of results in the dtype: out, lse, then gradients."""
    for i, (result, other, exact) in enumerate(zip(results, eager, truth, strict=True)):
        assert result.shape == exact.shape
        assert result.dtype == other.dtype
        few = 1e-6 if i < 2 else 4e-6
        few += torch.finfo(dtype).eps if dtype.itemsize == 2 else 0  # the result's own rounding
        norms = {"max": lambda t: t.abs().max().item(), "norm": lambda t: torch.linalg.vector_norm(t).item()}
        for name, norm in norms.items():
            scale = max(norm(exact), math.sqrt(exact.numel()) if name == "norm" else 1.0)
            error, allowed = norm(result.double() - exact) / scale, 2 * norm(other.double() - exact) / scale + few
            assert error <= allowed, f"tensor {i}, {name}: error {error:.1e}, allowed {allowed:.1e}"


def gpu_problems(dtype):
    """(name, options of Case) for the tests on a GPU."""
    yield "IN²'s", {"size": (20, 33), "heads": 8, "dim": 32, "kernel_size": 7, "bias": True, "layout": "packed"}
    for (name, shape), bias in zip(SHAPES.items(), itertools.cycle([False, True]), strict=False):
        yield name, shape | {"bias": bias}


def compilations(dtype, arch):
    """Launches IN²'s attention, packed, with a bias, of two windows; a video's; NAF's and AnyUp's at a ratio of 4.

    Forward and backward. Yields the form before.
    """
    yield "K 17"
    run([torch.empty(1, 64, 64, 3, 8, 32, dtype=dtype)], torch.empty(8, 33, 33), (17, 17), (1, 1), (1, 1), *PLAIN)
    for dim in (32, 128):
        yield f"dim {dim}"
        qkv, rpb = torch.empty(1, 64, 64, 3, 8, dim, dtype=dtype), torch.empty(8, 13, 13)
        run([qkv], rpb, (7, 7), (1, 2), (1, 1), (False, False), dim**-0.5, False)
    yield "video"
    volume = torch.empty(1, 8, 32, 32, 3, 8, 64, dtype=dtype)
    run([volume], None, (3, 7, 7), (1, 1, 1), (1, 1, 1), (True, False, False), 0.125, False)
    for name, heads, shared, dim, dim_v in (("NAF", 4, 4, 64, 96), ("AnyUp", 4, 1, 32, 384)):
        yield name
        shapes = (64, 64, heads, dim), (16, 16, heads, dim), (16, 16, shared, dim_v)
        qkv = [torch.empty(1, *shape, dtype=dtype) for shape in shapes]
        run(qkv, None, (9, 9), (1, 1), (1, 1), (False, False), dim**-0.5, shared == 1)


PLAIN = (False, False), 32**-0.5, False  # causal axes, scale, mean over heads


def run(*arguments):
    """Launches the Triton kernels, forward and backward."""
    out, lse = triton_kernels.forward(*arguments)
    qkv, rpb, *_ = arguments
    triton_kernels.backward(out, lse, lse, *arguments, needs=[True] * len(qkv) + [rpb is not None])
