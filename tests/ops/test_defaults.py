"""torch's defaults for new tensors, torch.set_default_dtype and torch.set_default_device, change no result."""

import ast
import contextlib
from importlib import import_module

import pytest
import torch
from op_backends import backends_of
from public_calls import CALLS, CASES, SMALL
from torch.utils._pytree import tree_leaves
from tree import LIBRARY, ROOT

import inr_kernels
from inr_kernels import models
from inr_kernels._core.dispatch import OPS
from inr_kernels.fourier_unit.op import dft_matmul
from inr_kernels.integrations.class_swap import ADAPTERS
from inr_kernels.local_implicit import op

FACTORIES = {function.__name__ for function in torch.utils._device._device_constructors()}
DEFAULTS = {
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "meta": torch.device("meta"),
}


@contextlib.contextmanager
def default(name):
    """Sets the default dtype or device."""
    value, dtype = DEFAULTS[name], torch.get_default_dtype()
    if isinstance(value, torch.device):
        with value:
            yield
        return
    torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def calls_without_a_dtype_or_device(tree):
    """The calls of torch's factories, or of partial(factory), that leave one of both to torch."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg for keyword in node.keywords}
        for function in (node.func, *node.args[:1]):
            is_factory = isinstance(function, ast.Attribute) and function.attr in FACTORIES
            if (
                is_factory
                and ast.unparse(function.value) in ("torch", "torch.fft")
                and not {"dtype", "device"} <= named
            ):
                yield ast.unparse(node)


@pytest.mark.parametrize("file", LIBRARY)
def test_new_tensors_name_their_dtype_and_device(file):
    assert not list(calls_without_a_dtype_or_device(ast.parse((ROOT / file).read_text())))


def test_the_walk_finds_such_calls():
    source = (
        "torch.zeros(3); f(torch.empty(2, dtype=d)); partial(torch.rand, dtype=d); torch.ones(1, dtype=d, device=e)"
    )
    assert len(list(calls_without_a_dtype_or_device(ast.parse(source)))) == 3


def outcome(run, name=None):
    """The tensors that a call returns."""
    torch.manual_seed(0)
    op._cached_centres.cache_clear()
    dft_matmul._factors.clear()
    with default(name) if name else contextlib.nullcontext():
        return [t for t in tree_leaves(run()) if isinstance(t, torch.Tensor)]


def assert_equal(got, expected):
    assert len(got) == len(expected) > 0
    for ours, other in zip(got, expected, strict=True):
        assert (ours.dtype, ours.device, ours.shape) == (other.dtype, other.device, other.shape)
        assert torch.equal(ours, other)


@pytest.mark.parametrize("name", CASES)
def test_ops(name):
    case = CASES[name](**SMALL.get(name, {}))
    for backend in [None, *backends_of(name)]:
        run = lambda backend=backend: case.run(torch.float32, backend)  # noqa: E731
        expected = outcome(run)
        for other in ("bfloat16", "meta") if backend == "triton" else DEFAULTS:
            assert_equal(outcome(run, other), expected)


@pytest.mark.parametrize("name", CALLS)
def test_every_call(name):
    run = CALLS[name]()
    expected = outcome(run)
    for other in ("bfloat16", "meta") if name == "export_program" else DEFAULTS:  # each export takes seconds
        assert_equal(outcome(run, other), expected)


def test_every_public_name_and_adapter_is_called():
    called = {name.partition(",")[0] for name in CALLS} | {op.function.__name__ for op in OPS.values()}
    without_tensors = {"__version__", "accelerate", "backend", "explain", "prove", "release_memory"}
    without_tensors |= {"export_onnx"}  # `export_program`, then torch's own exporter
    without_tensors |= {"Inpainter", "Network", "from_checkpoint", *(n for n in models.__all__ if n.endswith("Config"))}
    public = {*inr_kernels.__all__, *import_module("inr_kernels.fourier_unit").__all__, *models.__all__}
    assert public - without_tensors | {adapter.description for adapter in ADAPTERS} <= called


@pytest.mark.parametrize("network", [models.DEAR, models.IN2, models.LIIF])
def test_checkpoints_open_on_the_cpu(network):
    expected = network.pretrained().state_dict()
    with default("meta"):
        opened = network.pretrained().state_dict()
    assert all(torch.equal(opened[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", DEFAULTS)
def test_parameters_of_new_modules_have_the_default(name):
    """As those of torch's own layers."""
    with default(name):
        module = torch.nn.ModuleList(
            [
                inr_kernels.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True),
                models.LIIF(models.LIIFConfig(blocks=1, features=8, hidden=(8,))),
                models.IN2(models.IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(8, 8))),
                models.DEAR(models.DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8))),
                models.LaMa(models.LaMaConfig(features=8, blocks=1)),
            ]
        )
        own = torch.nn.Linear(1, 1).weight
    assert {(p.dtype, p.device) for p in module.parameters()} == {(own.dtype, own.device)}
