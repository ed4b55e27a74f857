"""Random problems for the tests of mlp, and their tolerances."""

import itertools
from dataclasses import dataclass, field

import torch

from inr_kernels.local_implicit import mlp

# Tests that reach every loop and border of the C++: test_sanitizers.py runs them.
SANITIZED = ["as_accurate_as_torchs_layers", "non_finite", "gradgradcheck", "checks_bounds", "any_strides"]

CASES = {
    "IN2's": {"rows": (2, 50), "widths": (64, 256, 64), "norm": True, "add": True},
    "one layer": {"widths": (48, 144)},
    "one layer, ragged": {"widths": (19, 37), "norm": True, "add": True},
    "ragged": {"rows": (3, 41), "widths": (31, 65, 15, 7), "norm": True, "add": True},
    "whole vectors": {"rows": (96,), "widths": (32, 64, 16)},
    "one row": {"rows": (), "widths": (20, 33, 20), "add": True},
    "one of each": {"rows": (1,), "widths": (1, 1, 1), "norm": True},
    "wide": {"rows": (29,), "widths": (70, 2000, 40)},
    "ReLU": {"widths": (24, 40, 12), "activation": "relu", "add": True},
    "deep": {"widths": (12,) * 9},
}


@dataclass
class Case:
    """A problem in float64, cast to the dtype under test: x, add, the norm's weight and bias, weights, biases."""

    batch: int = 2
    rows: tuple | None = None
    widths: tuple = (17, 40, 11)
    norm: bool = False
    add: bool = False
    activation: str = "gelu"
    tensors: list = field(default_factory=list)

    def __post_init__(self):
        rows = (self.batch, 13) if self.rows is None else self.rows
        pairs = list(itertools.pairwise(self.widths))
        randn = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
        weights, biases = [randn(o, i) / i**0.5 for i, o in pairs], [randn(o) for _, o in pairs]
        if self.activation == "relu":  # hidden units are far above or below 0, which rounding would cross at random
            weights = [0.2 * weight for weight in weights]
            biases = [bias.clamp(-2, 2) + 8 * (torch.arange(len(bias)) % 3 > 0) - 4 for bias in biases]
        norm = [randn(self.widths[0]) for _ in range(2)] if self.norm else [None, None]
        add = randn(*rows, self.widths[-1]) if self.add else None
        self.tensors = [randn(*rows, self.widths[0]), add, *norm, *weights, *biases]
        self.grad = randn(*rows, self.widths[-1])

    def run(self, dtype, backend, rounded=torch.float64):
        """The output, and the gradients of (output * grad).sum(); rounded: the dtype to round the inputs to first."""
        cast = lambda t: None if t is None else t.to(rounded).to(dtype, copy=True)  # noqa: E731
        x, add, weight, bias, *layers = tensors = [cast(t) for t in self.tensors]
        leaves = [t.requires_grad_() for t in tensors if t is not None]
        depth = len(layers) // 2
        options = {"norm_weight": weight, "norm_bias": bias, "add": add, "activation": self.activation}
        out = mlp(x, layers[:depth], layers[depth:], **options, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, cast(self.grad))]


def assert_kernel_as_accurate(case, dtype, backend="cpu"):
    """Asserts that each error against float64 is at most twice that of torch's layers, or a few roundings."""
    truth, eager = case.run(torch.float64, "reference", rounded=dtype), case.run(dtype, "reference")
    # In float64 the truth has the roundings of another order of the sums.
    few = 32 * torch.finfo(dtype).eps if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    for i, (result, other, exact) in enumerate(zip(case.run(dtype, backend), eager, truth, strict=True)):
        assert result.shape == exact.shape
        assert result.dtype == other.dtype == dtype
        for norm in (lambda t: t.abs().max().item(), lambda t: torch.linalg.vector_norm(t).item()):
            scale = max(norm(exact), 1e-300)
            error, allowed = (norm(t.double() - exact) / scale for t in (result, other))
            assert error <= 2 * allowed + few, f"tensor {i}: error {error:.1e}, torch's {allowed:.1e}"
