"""Accelerated models under torch.export and torch.jit.trace."""

import warnings

import pytest
import torch
from exported import ops
from upstream_decoders import StoresFeatures, TakesFeatures
from upstream_filters import KernelConv, Ported, Raft
from upstream_lama import Generator
from upstream_natten import Version17, Version21

import inr_kernels
from inr_kernels import accelerate, models

ACCELERATED = {
    "LIIF, stored features": (StoresFeatures, [(2, 3, 6, 5), (2, 9, 2), (2, 9, 2)]),
    "LIIF": (TakesFeatures, [(2, 3, 6, 5), (2, 9, 2), (2, 9, 2)]),
    "KernelConv": (KernelConv, [(2, 3, 5, 4), (2, 27, 5, 4)]),
    "KernelConv2D": (lambda: Ported(3), [(2, 3, 5, 4), (2, 27, 5, 4)]),
    "RAFT": (Raft, [(2, 2, 5, 4), (2, 576, 5, 4)]),
    "NATTEN 0.17": (lambda: Version17(8, 2, 3), [(2, 6, 7, 8)]),
    "NATTEN 0.21": (lambda: Version21(8, 2, 3), [(2, 6, 7, 8)]),
    "LaMa": (Generator, [(1, 4, 12, 18)]),
}
OWN = {
    "DEAR": lambda: models.DEAR(models.DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8,))),
    "IN2": lambda: models.IN2(models.IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8))),
    "LaMa": lambda: models.LaMa(models.LaMaConfig(features=8, blocks=1)),
}


def accelerated(name):
    """The model and its inputs, where some module is accelerated."""
    build, shapes = ACCELERATED[name]
    model = accelerate(build().eval())
    assert any(hasattr(module, "_inr_original") for module in model.modules())
    return model, tuple(torch.rand(shape) for shape in shapes)


@pytest.mark.parametrize("name", ACCELERATED)
def test_export_under_the_reference_has_torchs_ops_only(name):
    model, inputs = accelerated(name)
    with torch.no_grad(), inr_kernels.backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that LIIF assigns self.feat
        program = torch.export.export(model, inputs)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    found = ops(program)
    assert found and not any("inr_kernels" in op for op in found)


def assert_traces(model, inputs):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes become constants, and that torch.jit is deprecated
        traced = torch.jit.trace(model, inputs, check_trace=False)
        for values in (inputs, tuple(torch.rand_like(x) for x in inputs)):
            torch.testing.assert_close(traced(*values), model(*values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ACCELERATED)
def test_accelerated_models_trace(name):
    assert_traces(*accelerated(name))


@pytest.mark.parametrize("name", OWN)
def test_our_networks_trace(name):
    assert_traces(OWN[name]().eval(), (torch.rand(1, 3, 21, 26), torch.rand(1, 1, 21, 26).round()))
