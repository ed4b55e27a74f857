"""Random problems for the tests of elementwise_filter, their tolerances, and the Triton launches to compile."""

import itertools
import math
from dataclasses import dataclass, field

import torch

from inr_kernels import elementwise_filter
from inr_kernels.elementwise_filter import triton_kernels

# Tests that reach every loop and border of the C++: test_sanitizers.py runs them.
SANITIZED = ["test_shapes", "gradcheck", "needed_gradient", "checks_bounds", "extreme", "nan_stays", "empty"]

DELTA, LITERAL, PLAIN = (2.0, 0.0, -1.0), (1.0, 1.0, -1.0), (0.0, 0.0, 1.0)  # alpha, beta, gamma

SHAPES = {
    "one pixel": {"size": (1, 1)},
    "one row": {"size": (1, 40)},
    "one column": {"size": (40, 1)},
    "sides below K": {"size": (2, 3), "kernel_size": (7, 7)},
    "batch above K²": {"batch": 10, "channels": 2, "groups": 2},
    "K 1": {"kernel_size": (1, 1)},
    "K 9": {"kernel_size": (9, 9), "size": (5, 11)},
    "1 x 5": {"kernel_size": (1, 5)},
    "7 x 3": {"kernel_size": (7, 3)},
    "one group": {"groups": 1},
    "whole vectors": {"size": (5, 32)},
    "two blocks of rows": {"size": (37, 64), "channels": 2, "groups": 2},
    "bands": {"size": (67, 50), "batch": 1, "channels": 1, "groups": 1},
    "long bands": {"size": (40, 300), "batch": 1, "channels": 5, "groups": 1, "kernel_size": (5, 5)},
    "wide": {"size": (3, 1030), "channels": 1, "groups": 1},
    "dilation 4": {"dilation": 4},
    "stack": {"dilation": (1, 2, 3, 4)},
    "stack of one": {"dilation": (2,)},
    "stride 2": {"stride": 2},
    "stride 3": {"stride": 3, "size": (11, 40)},
    "stride above the size": {"stride": 20},
    "upscale 2": {"upscale": 2, "size": (5, 21)},
    "upscale 8": {"upscale": 8, "size": (3, 5)},
    "two thirds": {"upscale": 2, "stride": 3, "dilation": 2, "size": (9, 22)},
    "channels_last": {"layout": "channels_last"},
    "taps innermost": {"layout": "taps innermost", "groups": 1, "kernel_size": (7, 7), "size": (6, 17)},
    "every second": {"layout": "every second"},
}


@dataclass
class Case:
    """A filtering problem in float64, cast to the dtype under test."""

    batch: int = 2
    channels: int = 6
    size: tuple = (7, 9)  # of the output at stride and upscale 1
    groups: int = 6
    kernel_size: tuple = (3, 3)
    dilation: int | tuple = 1
    stride: int = 1
    upscale: int = 1
    padding: str = "zeros"
    normalize: str = "none"
    coefficients: tuple = PLAIN
    window: bool = False
    layout: str = "contiguous"
    tensors: tuple = field(default=())

    def __post_init__(self):
        kh, kw = self.kernel_size
        longest = max(self.dilation) if isinstance(self.dilation, tuple) else self.dilation
        reach = kh // 2 * longest, kw // 2 * longest
        height, width = self.size
        if self.padding == "reflect":
            height, width = max(height, reach[0] + 1), max(width, reach[1] + 1)
        out = [-(-side * self.upscale // self.stride) for side in (height, width)]
        if self.padding == "valid":
            height, width = height + 2 * reach[0], width + 2 * reach[1]
        x = torch.randn(self.batch, self.channels, height, width, dtype=torch.float64)
        kernel = torch.randn(self.batch, self.groups * kh * kw, *out, dtype=torch.float64)
        window = torch.randn(kh, kw, dtype=torch.float64) if self.window else None
        self.tensors = x, kernel, window

    def options(self, dtype=torch.float64):
        alpha, beta, gamma = self.coefficients
        window = None if self.tensors[2] is None else self.tensors[2].to(dtype)
        return {
            "kernel_size": self.kernel_size,
            "groups": self.groups,
            "dilation": self.dilation,
            "stride": self.stride,
            "upscale": self.upscale,
            "padding": self.padding,
            "normalize": self.normalize,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "log_window": window,
        }

    def laid_out(self, kernel):
        """The kernel's values in the memory order under test."""
        if self.layout == "channels_last":
            return kernel.contiguous(memory_format=torch.channels_last)
        if self.layout == "taps innermost":  # [B, H, W, K, K], permuted
            return kernel.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if self.layout == "every second":
            return kernel.repeat_interleave(2, 3)[..., ::2]
        return kernel

    def forward(self, dtype, backend, rounded=torch.float64):
        """The output, and the inputs x and kernel.

        rounded: the dtype to round the inputs to first, so that float64 starts from the values under test.
        """
        x, kernel = (t.to(rounded).to(dtype) for t in self.tensors[:2])
        x = x.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else x
        leaves = x.requires_grad_(), self.laid_out(kernel).requires_grad_()
        return elementwise_filter(*leaves, **self.options(rounded), backend=backend), leaves

    def run(self, dtype, backend, rounded=torch.float64):
        """The output and the gradients of (output * a fixed random tensor).sum() with respect to x and kernel.

        rounded: see `forward`.
        """
        out, leaves = self.forward(dtype, backend, rounded)
        generator = torch.Generator(out.device).manual_seed(1)
        grad = torch.randn(out.shape, dtype=torch.float64, device=out.device, generator=generator).to(rounded).to(dtype)
        grads = torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
        return [out.detach(), *grads]


def assert_kernel_as_accurate(case, dtype, backend):
    """Asserts that each error against float64 is at most twice eager's in the same dtype, or a few roundings.

    Measured in the largest element and in relative norm. The scale is that of the exact result, but at least that of
    its summands (about one): where all taps read the same pixel, the logits' gradient is exactly zero by cancellation.
    """
    truth = case.run(torch.float64, "reference", rounded=dtype)
    assert_as_accurate(case.run(dtype, backend), case.run(dtype, "reference"), truth, dtype)


def assert_forward_as_accurate(case, dtype, backend):
    """`assert_kernel_as_accurate` of the output alone."""
    with torch.no_grad():
        truth, _ = case.forward(torch.float64, "reference", rounded=dtype)
        (kernel, _), (eager, _) = (case.forward(dtype, name) for name in (backend, "reference"))
    assert_as_accurate([kernel], [eager], [truth], dtype)


def assert_as_accurate(results, eager, truth, dtype):
    """`assert_kernel_as_accurate` of results in the dtype: the output, then gradients."""
    for i, (result, other, exact) in enumerate(zip(results, eager, truth, strict=True)):
        assert result.shape == exact.shape
        assert result.dtype == other.dtype == dtype
        few = 1e-6 if i == 0 else 4e-6
        few += torch.finfo(dtype).eps if dtype.itemsize == 2 else 0  # the result's own rounding
        norms = {"max": lambda t: t.abs().max().item(), "norm": lambda t: torch.linalg.vector_norm(t).item()}
        for name, norm in norms.items():
            scale = max(norm(exact), math.sqrt(exact.numel()) if name == "norm" else 1.0)
            error, allowed = norm(result.double() - exact) / scale, 2 * norm(other.double() - exact) / scale + few
            assert error <= allowed, f"tensor {i}, {name}: error {error:.1e}, allowed {allowed:.1e}"


def gpu_problems(dtype):
    """(name, options of Case) for the tests on a GPU."""
    yield "DEAR's", {"channels": 64, "groups": 64, "size": (20, 33), "normalize": "taps", "coefficients": DELTA}
    kinds = list(triton_kernels.NORMALIZATIONS)
    # Paddings change first: each dtype takes every third problem, and so problems of all three kinds.
    for normalize, padding in itertools.product(kinds, triton_kernels.PADDINGS):
        options = {"padding": padding, "normalize": normalize, "window": normalize != "none", "groups": 3}
        yield f"{padding}, {normalize}", options | {"coefficients": (0.5, 0.25, 2.0)}
    for (name, shape), normalize in zip(SHAPES.items(), itertools.cycle(kinds), strict=False):
        padding = "zeros" if isinstance(shape.get("dilation"), tuple) else "reflect"
        yield name, shape | {"padding": padding, "normalize": normalize, "coefficients": LITERAL}


COMPILED = {  # as they appear in the papers of these names
    "DEAR": {"normalize": "taps", "padding": "reflect", "alpha": 2.0, "gamma": -1.0},
    "STFAN": {"kernel_size": (5, 5), "padding": "replicate"},
    "JPGNet": {"kernel_size": (5, 5), "groups": 32, "dilation": (1, 2), "normalize": "taps"},
    "RAFT": {"groups": 1, "upscale": 8, "normalize": "taps"},
    "PASA": {"groups": 2, "stride": 2, "padding": "reflect", "normalize": "all"},
    "CARAFE": {"kernel_size": (9, 9), "groups": 1, "upscale": 2, "normalize": "taps", "log_window": torch.empty(9, 9)},
}


def compilations(dtype, arch):
    """Launches each filter of COMPILED, forward and backward; yields its name before."""
    for name, options in COMPILED.items():
        if dtype == torch.float32 and name in ("STFAN", "PASA", "RAFT"):
            continue  # float32 differs in the loads and stores only, which the other two cover
        yield name
        defaults = {"kernel_size": (3, 3), "groups": 64, "dilation": (1,), "stride": 1, "upscale": 1}
        defaults |= {"padding": "zeros", "normalize": "none", "alpha": 0.0, "beta": 0.0, "gamma": 1.0}
        options = {**defaults, "log_window": None, **options}
        taps, side = math.prod(options["kernel_size"]), 64 * options["upscale"] // options["stride"]
        x = torch.empty(2, 64, 64, 64, dtype=dtype)
        kernel = torch.empty(2, options["groups"] * taps, side, side, dtype=dtype)
        triton_kernels.forward(x, kernel, *options.values())
        grad = torch.empty(len(options["dilation"]), 2, 64, side, side, dtype=dtype)
        triton_kernels.backward(grad, x, kernel, *options.values(), needs_x=True, needs_kernel=True)
