"""Random problems for the tests of fourier_unit, their tolerances, and the Triton launches to compile."""

import itertools
from dataclasses import dataclass, field

import torch

from inr_kernels import fourier_unit
from inr_kernels.fourier_unit import conv2d, conv3x3, triton_kernels

# Tests that reach every loop and border of the C++: test_sanitizers.py runs them.
SANITIZED = ["winograd", "of_the_weight", "halves_of", "test_shapes", "test_signs", "torchs_convolution"]
SANITIZED += ["threads_get", "prepared_weights"]

SHAPES = {
    "two tiles of frequencies": {"size": (13, 16)},
    "many channels": {"channels": 70, "outputs": 33, "size": (5, 6)},
    "one channel": {"channels": 1, "outputs": 1},
    "groups": {"channels": 6, "outputs": 4, "groups": 2},
    "channels_last": {"layout": "channels_last"},
    "one row": {"size": (1, 33)},
    "one column": {"size": (33, 1)},
    "a prime": {"size": (31, 29), "channels": 2, "outputs": 2},
}


@dataclass
class Case:
    """A problem in float64, cast to the dtype under test: x, weight, bn_weight, bn_bias, and the running statistics."""

    batch: int = 2
    channels: int = 4
    outputs: int = 6
    size: tuple = (6, 7)
    groups: int = 1
    training: bool = False
    norm: str = "ortho"
    layout: str = "contiguous"
    tensors: tuple = field(default=())
    statistics: tuple = field(default=())

    def __post_init__(self):
        rows, columns = 2 * self.outputs, 2 * self.channels // self.groups
        x = torch.randn(self.batch, self.channels, *self.size, dtype=torch.float64) + 0.5
        weight = torch.randn(rows, columns, 1, 1, dtype=torch.float64) / columns**0.5
        vectors = torch.rand(rows, dtype=torch.float64) + 0.5, torch.randn(rows, dtype=torch.float64)
        self.tensors = x, weight, *vectors
        self.statistics = torch.randn(rows, dtype=torch.float64), torch.rand(rows, dtype=torch.float64) + 0.5

    def run(self, dtype, backend, rounded=torch.float64, **options):
        """The output, the gradients of (output * t).sum() stacked over two fixed random t, and the final statistics.

        With one t, a gradient that sums over all frequencies may be near zero by chance, and its relative error large.

        rounded: the dtype to round x to first, so that float64 starts from the values under test. Parameters stay in
        float32 beside a half-precision x.
        """
        parameters = torch.promote_types(dtype, torch.float32)
        kept = torch.promote_types(rounded, torch.float32)
        x, *rest = self.tensors
        leaves = [x.to(rounded).to(dtype), *(t.to(kept).to(parameters) for t in rest)]
        if self.layout == "channels_last":
            leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)
        leaves = [t.requires_grad_() for t in leaves]
        statistics = [t.to(kept).to(parameters) for t in self.statistics]
        form = {"training": self.training, "groups": self.groups, "norm": self.norm}
        out = fourier_unit(*leaves, *statistics, **form, backend=backend, **options)
        generator = torch.Generator(out.device).manual_seed(1)
        draws = torch.randn(2, *out.shape, dtype=torch.float64, device=out.device, generator=generator)
        grads = [torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in draws.to(rounded).to(dtype)]
        return [out.detach(), *map(torch.stack, zip(*grads, strict=True)), *statistics]


@dataclass
class ConvolutionCase:
    """A problem of conv3x3 in float64, cast to the dtype under test: x, weight, bias, other, add."""

    batch: int = 2
    channels: int = 3
    others: int = 2
    outputs: int = 4
    size: tuple = (6, 7)
    padding: str = "reflect"
    tensors: tuple = field(default=())

    def __post_init__(self):
        image, inputs = (self.batch, self.channels, *self.size), self.channels + self.others
        shapes = [image, (self.outputs, inputs, 3, 3), (self.outputs,), (self.batch, self.others, *self.size)]
        shapes += [(self.batch, self.outputs, *self.size)]
        self.tensors = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def run(self, dtype, backend):
        """The output, and the gradients of (output * a fixed random tensor).sum()."""
        leaves = x, weight, bias, other, add = [t.to(dtype).requires_grad_() for t in self.tensors]
        options = {"other": other, "add": add, "relu": True, "padding": self.padding, "backend": backend}
        out = conv3x3(x, weight, bias, **options)
        generator = torch.Generator(out.device).manual_seed(1)
        grad = torch.randn(out.shape, dtype=torch.float64, device=out.device, generator=generator).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@dataclass
class Conv2dCase:
    """A problem of conv2d in float64, cast to the dtype under test: x, weight, bias, scale, add."""

    batch: int = 2
    channels: int = 3
    outputs: int = 4
    size: tuple = (6, 7)
    kernel: tuple = (3, 3)
    options: dict = field(default_factory=lambda: {"stride": 2, "padding": 1})
    tensors: tuple = field(default=())

    def __post_init__(self):
        image, pair = (self.batch, self.channels, *self.size), (self.outputs, self.channels)
        pair = pair[::-1] if self.options.get("transposed") else pair
        shapes = [image, (*pair, *self.kernel), (self.outputs,), (self.outputs,)]
        x, weight, *vectors = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
        empty = 0 in (*image[1:], *weight.shape)  # conv2d refuses it
        shape = x.shape if empty else conv2d(x, weight, backend="reference", **self.options).shape
        self.tensors = x, weight, *vectors, torch.randn(shape, dtype=torch.float64)

    def run(self, dtype, backend):
        """The output, and the gradients of (output * a fixed random tensor).sum()."""
        leaves = x, weight, bias, scale, add = [t.to(dtype).requires_grad_() for t in self.tensors]
        out = conv2d(x, weight, bias, scale=scale, add=add, relu=True, backend=backend, **self.options)
        generator = torch.Generator(out.device).manual_seed(1)
        grad = torch.randn(out.shape, dtype=torch.float64, device=out.device, generator=generator).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_kernel_as_accurate(case, dtype, backend, **options):
    """Asserts that each error against float64 is at most twice eager's, or a few roundings, in two norms."""
    truth = case.run(torch.float64, "reference", rounded=dtype)
    eager = case.run(dtype, "reference")
    for i, (result, other, exact) in enumerate(zip(case.run(dtype, backend, **options), eager, truth, strict=True)):
        assert result.shape == exact.shape
        assert result.dtype == other.dtype
        # In float64 the truth has the roundings of another order of the sums, too.
        few = 16 * torch.finfo(torch.float64).eps if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
        few += torch.finfo(dtype).eps if result.dtype.itemsize == 2 else 0  # the result's own rounding
        for norm in (lambda t: t.abs().max().item(), lambda t: torch.linalg.vector_norm(t).item()):
            scale = max(norm(exact), 1e-300)
            error, allowed = norm(result.double() - exact) / scale, 2 * norm(other.double() - exact) / scale + few
            assert error <= allowed, f"tensor {i}: error {error:.1e}, allowed {allowed:.1e}"


def gpu_problems(dtype):
    """(name, options of Case) for the tests on a GPU."""
    yield "LaMa's", {"channels": 192, "outputs": 192, "size": (64, 64)}
    yield "larger than the matrix-product DFT", {"size": (70, 66)}
    for (name, shape), training in zip(SHAPES.items(), itertools.cycle([False, True]), strict=False):
        yield name, shape | {"training": training}


def compilations(dtype, arch):
    """Launches the product on Big-LaMa's spectrum at 512², and the DFT of its columns; yields the precision before.

    The spectrum is always float32; dtype bfloat16 selects TF32, on the tensor cores.
    """
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    yield "ieee" if dtype == torch.float32 else "tf32"
    spectrum, weight = torch.empty(1, 192, 64, 33, dtype=torch.complex64), torch.empty(384, 384)
    triton_kernels.product(spectrum, weight, torch.empty(384), True, 1)
    triton_kernels.product(spectrum.view(192, 64, 1, 33), torch.empty(128, 128), None, False, 1)
