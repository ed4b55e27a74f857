"""accelerate on CARAFE: the same output and gradients, or no change."""

import copy
import logging
import pickle

import pytest
import torch
from integrations_cases import assert_not_accelerated
from torch import nn
from upstream_carafe import CARAFE, UNSUPPORTED, Renamed

from inr_kernels import accelerate, elementwise_filter
from inr_kernels.integrations import filter_dtypes, restore


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="inr_kernels")
    return caplog


def is_accelerated(model, x):
    """Whether a call runs on our op."""
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr(
            filter_dtypes, "elementwise_filter", lambda *a, **k: calls.append(a) or elementwise_filter(*a, **k)
        )
        model(x)
    return bool(calls)


def results(model, x):
    """The output, and the gradients of the input and the parameters."""
    out = model(x)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("cls", "options"), [(CARAFE, {}), (Renamed, {"scale": 3, "k_up": 3}), (CARAFE, {"scale": 1})])
def test_output_and_gradients_match_the_original(cls, options, dtype, log):
    model = cls(3, **options).to(dtype)
    twin = copy.deepcopy(model)
    assert accelerate(model) is model
    assert log.messages == [f"{cls.__name__} accelerated: CARAFE"]
    assert isinstance(model, cls)
    for shape in ((2, 3, 5, 6), (1, 3, 1, 3)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        for training in (True, False):
            for ours, theirs in zip(results(model.train(training), x), results(twin.train(training), x), strict=True):
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
                tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
                assert (ours - theirs).norm() <= tolerance * max(theirs.norm(), 1)
    assert is_accelerated(model, x)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_modules_are_not_accelerated(name, log):
    build, reason = UNSUPPORTED[name]
    assert_not_accelerated(build(), reason, log)


def test_a_lookalike_is_named(log):
    accelerate(type("CARAFE", (nn.Module,), {})())
    assert "its class has the name of one with CARAFE, but it has no scale" in log.messages[0]


def test_calls_that_use_the_original(log):
    model, x = accelerate(CARAFE(3)), torch.randn(1, 3, 4, 5)
    assert is_accelerated(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_accelerated(model, x)
    assert log.messages[-1].endswith("autocast is enabled")
    seen = []
    handle = model.upsmp.register_forward_hook(lambda *_: seen.append(1))
    assert not is_accelerated(model, x)
    assert seen
    handle.remove()
    assert is_accelerated(model, x)
    model.unfold = nn.Unfold(5, dilation=2, padding=3)
    with pytest.raises(RuntimeError):  # as the original
        model(x)
    assert "its layers are not those of a scale of 2" in log.messages[-1]


@pytest.mark.parametrize(("cls", "name", "other"), [(CARAFE, "X", "x"), (Renamed, "x", "X")])
def test_the_argument_by_its_name(cls, name, other, log):
    model, x = accelerate(cls(3)).eval(), torch.randn(1, 3, 4, 5)
    torch.testing.assert_close(model(**{name: x}), model(x))
    assert len(log.messages) == 1  # that it is accelerated
    for args, named in (([], {}), ([], {other: x}), ([x, x], {}), ([x], {name: x})):
        with pytest.raises(TypeError):  # as the original
            model(*args, **named)


def test_restore_copies_and_pickles():
    model, x = accelerate(CARAFE(3)).eval(), torch.randn(1, 3, 4, 5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        torch.testing.assert_close(twin(x), model(x))
    assert type(restore(model)) is CARAFE
