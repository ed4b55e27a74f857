"""Random problems for the tests of local_texture; tolerances are those of local_implicit."""

import itertools
from dataclasses import dataclass, field

import torch
from local_implicit_cases import assert_kernel_as_accurate  # noqa: F401  for the tests on a GPU

from inr_kernels import local_texture_decode
from inr_kernels.local_implicit.reference import pixel_centres

# Tests that reach every loop and border of the C++: test_sanitizers.py runs them.
SANITIZED = ["as_accurate_as_eager", "non_finite", "gradcheck"]

CASES = {
    "LTE": {},
    "one frequency": {"frequencies": 1},
    "whole vectors": {"frequencies": 16, "hidden": (32, 64)},
    "ragged": {"frequencies": 21, "hidden": (37, 20, 70), "out": 5},
    "one Linear": {"frequencies": 9, "hidden": ()},
    "one pixel": {"size": (1, 1)},
    "one column": {"size": (9, 1)},
    "one query": {"queries": 1, "batch": 1},
    "wide output": {"out": 70},
    "x3": {"grid": (12, 15), "size": (4, 5), "batch": 1},
    "far outside": {"spread": 2.0},
}


@dataclass
class Case:
    """A decoding problem in float64, cast to the dtype under test."""

    batch: int = 2
    frequencies: int = 7
    size: tuple = (6, 7)
    queries: int = 33
    hidden: tuple = (20, 17)
    out: int = 3
    grid: tuple = ()  # the queries are this grid's pixels
    spread: float = 1.2  # else random in [-spread, spread]
    relu_margin: bool = False  # every hidden unit is far from its ReLU's corner, which rounding would cross at random
    tensors: list = field(default_factory=list)

    def __post_init__(self):
        randn = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
        channels = 2 * self.frequencies
        coef, freq = randn(self.batch, channels, *self.size), randn(self.batch, channels, *self.size)
        if self.grid:
            coord = torch.stack(torch.meshgrid(*map(pixel_centres, self.grid), indexing="ij"), -1).flatten(0, 1)
            self.coord = coord.expand(self.batch, -1, 2).contiguous()
        else:
            self.coord = (torch.rand(self.batch, self.queries, 2) * 2 - 1) * self.spread
        self.cell = torch.rand(self.coord.shape) / 5
        widths = [channels, *self.hidden, self.out]
        weights = [randn(n, k) / k**0.5 for k, n in itertools.pairwise(widths)]
        biases = [randn(n) / 4 for n in widths[1:]]
        if self.relu_margin:
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                weight *= 0.3
                bias += torch.where(torch.arange(len(bias)) % 3 > 0, 4.0, -4.0)
        self.tensors = [coef, freq, randn(self.frequencies, 2), *weights, *biases]

    def arguments(self, leaves):
        """The arguments of local_texture_decode; leaves: `tensors` in another dtype."""
        coef, freq, phase, *parameters = leaves
        n = len(parameters) // 2
        return coef, freq, self.coord, self.cell, phase, parameters[:n], parameters[n:]

    def cast(self, dtype):
        """The arguments of local_texture_decode; coordinates stay float32."""
        return self.arguments([t.to(dtype) for t in self.tensors])

    def run(self, dtype, backend, rounded=torch.float64):
        """The output, and the gradients of (output * a fixed random tensor).sum(); inputs are first `rounded`."""
        leaves = [t.to(rounded).to(dtype).requires_grad_() for t in self.tensors]
        out = local_texture_decode(*self.arguments(leaves), backend=backend)
        generator = torch.Generator(out.device).manual_seed(1)
        grad = torch.randn(out.shape, dtype=torch.float64, device=out.device, generator=generator).to(rounded).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def gpu_problems(dtype):
    """(name, options of Case) for the tests on a GPU."""
    half = {"relu_margin": dtype != torch.float32}
    yield "LTE's decoder", {"hidden": (256,) * 3, "frequencies": 128, "queries": 500} | half
    for name, shape in CASES.items():
        yield name, shape | half
