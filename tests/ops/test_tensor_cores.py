"""The Triton kernels in bfloat16, and with the rounding of tensor cores, in the interpreter."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from compile_triton import TRITON_OPS, kernels
from tensor_cores import interpreted, to_bfloat16, truncated_product
from triton.runtime.interpreter import InterpretedFunction

from inr_kernels._core.dispatch import OPS, always

# Problems that run every kernel of an op.
PROBLEMS = {
    "local_implicit": [{"queries": 20}, {"queries": 20, "ensemble_after": "first"}],
    "local_texture": [{}],
    "elementwise_filter": [
        {"normalize": normalize, "size": (3, 5), "batch": 1, "channels": 2, "groups": 2}
        for normalize in ("taps", "all")
    ],
    "unmask_attention": [{"shape": (1, 24, 8, 9)}, {"shape": (1, 24, 8, 9), "mask_keys": True}],
    "neighborhood_attention": [
        {"size": (5, 7), "kernel_size": 3, "dim": 16, "bias": True, "batch": 1},
        {"size": (1, 18), "kernel_size": (1, 17), "dim": 16, "bias": True, "batch": 1},
        {"size": (5, 7), "kernel_size": 3, "dim": 16, "batch": 1, "shared": (2, 1), "mean_heads": True},
    ],
    "fourier_unit": [{"size": (7, 6)}, {"size": (3, 4), "channels": 20, "outputs": 20, "batch": 1}],
}
CASES = {op: importlib.import_module(f"{op}_cases") for op in PROBLEMS}
MULTIPLYING = [op for op in TRITON_OPS if any(kernels(op).values())]
MARGIN = {"local_implicit": {"relu_margin": True}, "local_texture": {"relu_margin": True}}


@pytest.fixture(autouse=True)
def can_run(monkeypatch):
    """Triton runs in bfloat16, which it refuses in an interpreter that is not patched."""
    for op in PROBLEMS:
        triton = OPS[op].backends["triton"]
        monkeypatch.setitem(OPS[op].backends, "triton", replace(triton, why_not=always))


@pytest.mark.parametrize("op", PROBLEMS)
def test_every_kernel_in_bfloat16(op, monkeypatch):
    launched, launch = set(), InterpretedFunction.__getitem__

    def record(self, grid):
        launched.add(self.fn.__name__)
        return launch(self, grid)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", record)
    with interpreted():
        for options in PROBLEMS[op]:
            case = CASES[op].Case(**options | MARGIN.get(op, {}))
            CASES[op].assert_kernel_as_accurate(case, torch.bfloat16, "triton")
    name = "local_implicit" if op == "local_texture" else op
    expected = set(kernels(name)) - {"blend_backward" if op == "local_texture" else "texture_backward"}
    assert launched == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", MULTIPLYING)
def test_the_rounding_of_tensor_cores_is_within_the_documented_error(op, dtype):
    """At most twice that of plain PyTorch, which adds exactly here; float32 has tensor cores in tf32x3 products."""
    with interpreted(truncate=True):
        for options in PROBLEMS[op]:
            case = CASES[op].Case(**options | MARGIN.get(op, {}))
            CASES[op].assert_kernel_as_accurate(case, dtype, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("op", MULTIPLYING)
def test_tf32_errs_by_a_few_roundings(op):
    """Of its 10 fraction bits. Without fourier_unit's gradients, where rounding crosses the corner of a ReLU."""
    torch.set_float32_matmul_precision("high")
    try:
        for options in PROBLEMS[op]:
            case = CASES[op].Case(**options | MARGIN.get(op, {}))
            exact = case.run(torch.float64, "reference")[: 1 if op == "fourier_unit" else None]
            with interpreted(truncate=True):
                found = case.run(torch.float32, "triton")
            errors = [((r.double() - e).norm() / e.norm()).item() for r, e in zip(found, exact, strict=False)]
            assert 2**-12 < max(errors) < 2**-8  # the lower bound: TF32 was in use
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_model_of_a_tensor_core():
    """It cuts off what is 24 bits below the largest term, and adds at most 8 products before it rounds toward zero."""
    one, tiny = np.ones((1, 1), np.float32), np.full((1, 16), 2.0**-25, np.float32)
    assert truncated_product(tiny, np.ones((16, 1), np.float32), one) == 1
    assert truncated_product(4 * tiny, np.ones((16, 1), np.float32), one) == 1 + 2.0**-19
    assert truncated_product(np.float32([[-(2.0**-25)]]), one, one) == 1
    numbers = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    bits = torch.from_numpy(to_bfloat16(numbers.numpy()).view(np.int16))
    assert torch.equal(bits.view(torch.bfloat16), numbers.bfloat16())
