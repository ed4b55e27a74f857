"""accelerate and restore on LTE decoders: the same output as the original, or no change."""

import copy
import logging
import pickle

import pytest
import torch
from integrations_cases import assert_not_accelerated
from upstream_decoders import assert_close, without_cuda
from upstream_lte import UNSUPPORTED, Plus, Texture

from inr_kernels import accelerate
from inr_kernels.integrations import lte, restore

KINDS = {name: lambda name=name: Texture(name) for name in ("LTE", "ELTE", "SLTE")} | {"LTE+": Plus}


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="inr_kernels")
    return caplog


def problem(model):
    image = torch.rand(2, 3, 6, 5)
    if isinstance(model, Plus):
        return image, torch.rand(2, 4, 7, 2) * 2.4 - 1.2, torch.rand(2, 2) * 0.4
    return image, torch.rand(2, 30, 2) * 2.4 - 1.2, torch.rand(2, 30, 2) * 0.4


def is_accelerated(model, *args):
    """Whether a call runs on our op."""
    with without_cuda(), pytest.MonkeyPatch.context() as patch:
        calls, decode = [], lte.local_texture_decode
        patch.setattr(lte, "local_texture_decode", lambda *a, **k: calls.append(a) or decode(*a, **k))
        model(*args)
    return bool(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_match_the_original(kind):
    model = KINDS[kind]()
    args, parameters = problem(model), list(model.parameters())
    with without_cuda():
        theirs = model(*args)
        weight = torch.randn_like(theirs)
        grads = torch.autograd.grad(theirs, parameters, weight)
    assert accelerate(model) is model
    ours = model.train()(*args)
    assert_close(ours, theirs)
    for grad, theirs in zip(torch.autograd.grad(ours, parameters, weight), grads, strict=True):
        assert_close(grad, theirs)
    assert is_accelerated(model, *args)
    assert not is_accelerated(restore(model), *args)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_decoders_are_not_accelerated(name, log):
    build, reason = UNSUPPORTED[name]
    assert_not_accelerated(build(), reason, log)


def test_copies_are_accelerated():
    model = accelerate(Texture())
    args = problem(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_accelerated(other, *args)
        assert torch.equal(other(*args), model(*args))


CHANGES = {
    "hook": (lambda m, a: m.coef.register_forward_hook(lambda *_: None) and a, "has a hook"),
    "one cell": (lambda m, a: (*a[:2], a[2][:, :1]), "unsupported type, shape"),
    "a layer": (lambda m, a: m.imnet.layers.append(torch.nn.ReLU()) and a, "its MLP must be Linear, ReLU"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_unsupported_calls_use_the_original(name, log):
    model = accelerate(Texture())
    change, reason = CHANGES[name]
    args = change(model, problem(model))
    assert not is_accelerated(model, *args)
    assert reason in log.records[-1].getMessage()
