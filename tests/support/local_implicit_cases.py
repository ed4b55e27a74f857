"""Random problems for the tests of local_implicit, their tolerances, and the Triton launches to compile."""

import itertools
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch

from inr_kernels import local_implicit_decode
from inr_kernels.local_implicit import triton_kernels
from inr_kernels.local_implicit.reference import pixel_centres

# Tests that reach every loop and border of the C++: test_sanitizers.py runs them.
SANITIZED = ["shapes_and_scales", "layouts", "needed_gradient", "checks_bounds", "non_finite", "gradcheck", "heap"]

FLAGS = [(u, e, c) for u in (False, True) for e in (False, True) for c in (False, True)]

CASES = {
    "LIIF": {},
    "first": {"ensemble_after": "first"},
    "first, no cell": {"ensemble_after": "first", "cell_decode": False},
    "nearest": {"local_ensemble": False},
    "nearest, first": {"local_ensemble": False, "ensemble_after": "first"},
    "no unfold, no cell": {"feat_unfold": False, "cell_decode": False, "out": 1},
    "shallow": {"hidden": (20,)},
    "shallow, first": {"hidden": (37,), "ensemble_after": "first"},
    "ragged": {"hidden": (37, 20, 70), "out": 5},
    "wide output": {"hidden": (16, 16), "out": 70, "ensemble_after": "first"},
    "one pixel": {"size": (1, 1)},
    "one column": {"size": (9, 1)},
    "far outside": {"spread": 4.0},
    "x3": {"grid": (12, 15), "size": (4, 5), "batch": 1},
}
SHAPES = {
    "one pixel": {"size": (1, 1)},
    "one row": {"size": (1, 9)},
    "one column": {"size": (9, 1)},
    "one query": {"queries": 1, "batch": 1},
    "one channel": {"channels": 1, "out": 1},
    "no hidden to hidden layer": {"hidden": (24,)},
    "one unit": {"hidden": (1, 1)},
    "whole vectors": {"hidden": (32, 64, 16), "channels": 16},
    "ragged": {"hidden": (31, 65, 15), "out": 37},
    "wide output": {"out": 129},
    "LIIF's own": {"hidden": (256, 256, 256, 256), "channels": 64, "queries": 99},
    "deep": {"hidden": (12,) * 9},
    "far outside": {"spread": 4.0},
    "x1": {"grid": (6, 7)},
    "x3": {"grid": (18, 21)},
    "x5": {"size": (4, 5), "grid": (20, 25)},
    "x1.5": {"grid": (9, 10)},
    "x2.7": {"size": (10, 10), "grid": (27, 27)},
    "x30": {"size": (2, 3), "grid": (60, 90), "batch": 1},
    "shrinking": {"size": (9, 8), "grid": (4, 3)},
}


@dataclass
class Case:
    """A decoding problem in float64, cast to the dtype under test."""

    batch: int = 2
    channels: int = 5
    size: tuple = (6, 7)
    queries: int = 33
    hidden: tuple = (20, 17)
    out: int = 3
    feat_unfold: bool = True
    local_ensemble: bool = True
    cell_decode: bool = True
    ensemble_after: str = "last"
    grid: tuple = ()  # the queries are this grid's pixels
    spread: float = 1.2  # else random in [-spread, spread]
    relu_margin: bool = False  # every hidden unit is far from its ReLU's corner, which rounding would cross at random
    tensors: dict = field(default_factory=dict)

    def __post_init__(self):
        feat = torch.randn(self.batch, self.channels, *self.size, dtype=torch.float64)
        if self.grid:
            axes = [pixel_centres(n) for n in self.grid]
            coord = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
            coord = coord.expand(self.batch, -1, 2).contiguous()
            cell = torch.tensor([2 / n for n in self.grid]).expand(self.batch, 2)
        else:
            coord = (torch.rand(self.batch, self.queries, 2) * 2 - 1) * self.spread
            cell = torch.rand(self.batch, self.queries, 2) / 5
        inputs = [self.channels * (9 if self.feat_unfold else 1), *self.hidden]
        inputs[0] += 2
        if self.cell_decode:
            inputs[1 if self.ensemble_after == "first" else 0] += 2
        widths = [*self.hidden, self.out]
        weights = [torch.randn(n, k, dtype=torch.float64) / k**0.5 for n, k in zip(widths, inputs, strict=True)]
        biases = [torch.randn(n, dtype=torch.float64) / 4 for n in widths]
        self.tensors = {
            "feat": feat,
            "coord": coord,
            "cell": cell if self.cell_decode else None,
            "weights": weights,
            "biases": biases,
        }
        if self.relu_margin:
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                weight *= 0.3
                bias += torch.where(torch.arange(len(bias)) % 3 > 0, 4.0, -4.0)

    def cast(self, dtype):
        """feat, coord, cell, weights, biases in dtype; coordinates stay float32."""
        t = self.tensors
        cast = [v.to(dtype) for v in (t["feat"], *t["weights"], *t["biases"])]
        n = len(t["weights"])
        return cast[0], t["coord"], t["cell"], cast[1 : 1 + n], cast[1 + n :]

    def decode(self, dtype, backend, gradients=False, rounded=torch.float64):
        """The output and, if requested, the gradients of (output * a fixed random tensor).sum().

        rounded: the dtype to round the inputs to first, so that float64 starts from the values under test.
        """
        feat, coord, cell, weights, biases = self.cast(rounded)
        leaves = [t.to(dtype).requires_grad_(gradients) for t in (feat, *weights, *biases)]
        n = len(weights)
        out = local_implicit_decode(
            leaves[0],
            coord,
            cell,
            leaves[1 : 1 + n],
            leaves[1 + n :],
            feat_unfold=self.feat_unfold,
            local_ensemble=self.local_ensemble,
            ensemble_after=self.ensemble_after,
            backend=backend,
        )
        if not gradients:
            return [out]
        generator = torch.Generator(out.device).manual_seed(1)
        grad = torch.randn(out.shape, dtype=torch.float64, device=out.device, generator=generator).to(rounded).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def run(self, dtype, backend, rounded=torch.float64):
        """`decode` with gradients."""
        return self.decode(dtype, backend, gradients=True, rounded=rounded)


def assert_kernel_as_accurate(case, dtype, backend="cpu"):
    """Applies `assert_as_accurate` to the output and the gradients of a backend."""
    truth = case.run(torch.float64, "reference", rounded=dtype)
    assert_as_accurate(case.run(dtype, backend), case.run(dtype, "reference"), truth)


def assert_as_accurate(results, eager, truth):
    """Asserts that each error against float64 is at most twice eager's in the same dtype, or a few roundings.

    The first tensor is the output, to 1e-6; the others are gradients, sums that may cancel, to 1e-5. Both in the
    largest element, relative to the largest of the exact result, and in relative norm.
    """
    for i, (result, other, exact) in enumerate(zip(results, eager, truth, strict=True)):
        assert result.shape == exact.shape
        assert result.dtype == other.dtype
        few = 1e-6 if i == 0 else 1e-5
        if result.dtype.itemsize == 2:
            few += torch.finfo(result.dtype).eps  # the result's own rounding
        for norm in (lambda t: t.abs().max(), torch.linalg.vector_norm):
            scale = norm(exact) + 1e-30
            error = norm(result.double() - exact) / scale
            allowed = 2 * norm(other.double() - exact) / scale + few
            assert error <= allowed, f"tensor {i}: error {error:.1e}, allowed {allowed:.1e}"


def gpu_problems(dtype):
    """(name, options of Case) for the tests on a GPU."""
    half = {"relu_margin": dtype != torch.float32}
    yield "LIIF's decoder", {"hidden": (256,) * 4, "channels": 64, "queries": 500} | half
    for name, shape in (CASES | SHAPES).items():
        yield name, shape | half
    for (unfold, ensemble, cell), after in itertools.product(FLAGS, ("last", "first")):
        flags = {"feat_unfold": unfold, "local_ensemble": ensemble, "cell_decode": cell, "ensemble_after": after}
        yield f"u{unfold:d}e{ensemble:d}c{cell:d}-{after}", flags | half


def compilations(dtype, arch):
    """Launches LIIF's decoder, 256 x 4 to 3 channels, on one 48 x 48 patch; yields the ensemble's place before. Then
    LTE's."""
    for mode in ("last", "first", "texture"):
        yield mode
        first, texture, empty = mode == "first", mode == "texture", partial(torch.empty, dtype=dtype)
        widths = [256, 256, 256, 256, 3]
        inputs = [258 if first else 256, *widths[1:-1]]  # the cell's two columns join the blend
        weights = [empty(n, k) for n, k in zip(widths[1:], inputs, strict=True)]
        position = empty(128, 2) if texture else empty(256, 2 if first else 4)
        arguments = {"hoisted": empty(1, 48, 48, 512 if texture else 256), "y": torch.empty(1, 64, 64)}
        arguments |= {"x": torch.empty(1, 64, 64), "cell": torch.empty(1, 64, 64, 2), "position_weight": position}
        arguments |= {"weights": weights, "biases": [empty(n) for n in widths[1:]], "height": 48, "band_start": 0}
        arguments |= {"local_ensemble": True, "ensemble_first": first}
        with mock.patch.object(triton_kernels, "capability", return_value=divmod(arch, 10)):
            triton_kernels.forward(*arguments.values())
            triton_kernels.backward(empty(1, 64, 64, 3), *arguments.values(), needs_hoisted=True, needs_weights=True)
