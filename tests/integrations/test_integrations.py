"""accelerate and restore: the same output as the foreign decoder, or hands off."""

import copy
import gc
import logging

import pytest
import torch
from integrations_cases import assert_left_alone
from local_implicit_cases import FLAGS
from torch import nn
from upstream_decoders import (
    MUTANTS,
    Given,
    Kept,
    Mlp,
    Residual,
    assert_close,
    is_fused,
    one_thread,  # noqa: F401  a fixture
    original,
    problem,
    without_cuda,
)

from inr_kernels import accelerate
from inr_kernels.integrations import class_swap, liif, restore


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="inr_kernels")
    return caplog


BOTH = pytest.mark.parametrize("cls", [Kept, Given])


@BOTH
@pytest.mark.parametrize(("unfold", "ensemble", "cell"), FLAGS)
def test_output_and_gradients_are_the_originals(cls, unfold, ensemble, cell):
    model, args = cls(ensemble, unfold, cell), problem()
    theirs = original(model, *args)
    weight = torch.randn_like(theirs)
    with without_cuda():
        grads = torch.autograd.grad(model(*args), list(model.parameters()), weight)
    assert accelerate(model) is model
    ours = model.train()(*args)
    assert_close(ours, theirs)
    for grad, theirs in zip(torch.autograd.grad(ours, list(model.parameters()), weight), grads, strict=True):
        assert_close(grad, theirs)
    assert is_fused(model, *args)
    if not cell:
        assert_close(model(*args[:2], None), ours)


@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_not_liif_is_left_alone(name, log):
    build, reason = MUTANTS[name]
    assert_left_alone(build(), reason, log)


def test_log_names_what_was_replaced(log):
    accelerate(nn.ModuleDict({"generator": Given(), "other": nn.Linear(2, 2)}))
    (record,) = log.records
    assert (record.levelname, record.getMessage()) == (
        "INFO",
        "Given at 'generator' replaced: LIIF's decoding, fused",
    )


def test_no_decoder(log):
    accelerate(nn.Linear(2, 2))
    assert log.messages == ["nothing that accelerate knows in Linear"]
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
            function("liif")


@BOTH
def test_restore_leaves_no_trace(cls):
    model, args = cls(), problem()
    before, theirs = set(vars(model)), original(model, *args)
    assert accelerate(accelerate(model)) is model
    assert isinstance(model, cls)
    assert (type(model).__name__, type(model).__module__) == (cls.__name__, cls.__module__)
    assert repr(model) == repr(cls())
    with torch.no_grad():
        assert_close(model(*args), theirs)
        model(*args)
    assert restore(restore(model)) is model
    assert type(model) is cls
    assert model not in liif._CACHES
    assert set(vars(model)) - {"feat"} == before
    assert list(model.state_dict()) == list(cls().state_dict())


def test_probe_leaves_the_world_as_it_was():
    model = Kept().double().requires_grad_(False)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        accelerate(model)
    assert class_swap.Accelerated in type(model).__mro__
    assert torch.equal(rng, torch.get_rng_state())
    assert "feat" not in vars(model)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_probe_stays_on_the_cpu():
    class Restless(Kept):
        def query_rgb(self, coord, cell=None):
            coord = coord.to("cuda") + torch.zeros(2, device=torch.device("cuda", 0))
            return super().query_rgb(coord.cuda(0), cell.to(device="cuda:0"))

    assert isinstance(accelerate(Restless()), class_swap.Accelerated)


def test_weights_do_not_matter_to_the_probe():
    with torch.device("meta"):
        model = accelerate(Kept())
    assert isinstance(model, class_swap.Accelerated)
    model = Kept()
    nn.init.zeros_(model.imnet.layers[-1].weight)
    assert isinstance(accelerate(model), class_swap.Accelerated)


def test_float64_stays_with_the_original():
    model = accelerate(Given().double())
    args = [t.double() for t in problem()]
    assert torch.equal(model(*args), original(model, *args))


@BOTH
def test_chunks_pay_for_the_first_layer_once(cls):
    model, (inp, coord, cell) = accelerate(cls()), problem()
    with torch.no_grad():
        if cls is Given:
            assert_close(model(inp, coord, cell, test_mode=True), model(inp, coord, cell))
            return
        feat = model.gen_feat(inp)
        whole = model.query_rgb(coord, cell)
        entry = liif._CACHES[model]._entry
        chunks = [model.query_rgb(*part) for part in zip(coord.split(7, 1), cell.split(7, 1), strict=True)]
        assert liif._CACHES[model]._entry is entry
    assert_close(torch.cat(chunks, 1), whole)
    assert entry.feat() is feat
    model.gen_feat(inp.flip(0))
    with torch.no_grad():
        assert_close(model.query_rgb(coord, cell), original(model, inp.flip(0), coord, cell))


def test_cache_dies_with_its_model():
    model = accelerate(Kept())
    with torch.no_grad():
        model(*problem())
    caches = len(liif._CACHES)
    del model
    gc.collect()
    assert len(liif._CACHES) == caches - 1


def hook(model):
    model.imnet.layers[2].register_forward_hook(lambda module, args, out: 2 * out)


def pre_hook(model):
    model.imnet.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def gelu(model):
    model.imnet.layers[1] = nn.GELU()


def no_ensemble(model):
    model.local_ensemble = False


def other_imnet(model):
    model.imnet = Residual(model.imnet.layers[0].in_features, 3)


def other_method(model):
    cls = model.__class__.__bases__[-1]
    cls.query_rgb = lambda self, *args: args[-2].sin()


@BOTH
@pytest.mark.parametrize("change", [hook, pre_hook, gelu, no_ensemble, other_imnet, other_method])
def test_later_changes_are_honoured(cls, change, log):
    cls = type("Fresh", (cls,), {"query_rgb": cls.query_rgb})
    model, args = accelerate(cls()), problem()
    assert is_fused(model, *args)
    change(model)
    log.clear()
    with without_cuda():
        ours = [model(*args), model(*args)]
    theirs = original(model, *args)
    assert torch.equal(ours[0], theirs)
    assert (
        len([message for message in log.messages if message.startswith("Fresh computes some calls as before: ")]) == 1
    )


@BOTH
def test_a_hook_on_all_modules_is_honoured(cls):
    model, args = accelerate(cls()), problem()
    hook = nn.modules.module.register_module_forward_hook(lambda m, _, out: 2 * out if type(m) is nn.Linear else None)
    try:
        with without_cuda():
            assert torch.equal(model(*args), original(model, *args))
    finally:
        hook.remove()
    assert is_fused(model, *args)


@BOTH
def test_harmless_changes_stay_fused(cls):
    model, args = accelerate(cls()), problem()
    inputs = model.imnet.layers[0].in_features
    model.imnet = Mlp(inputs, 5, hidden=(8, 7, 6))
    model.eval_bsize = 3
    assert is_fused(model, *args)
    assert_close(model(*args), original(model, *args))


def test_a_flag_that_was_changed_is_taken_up_by_accelerate():
    model, args = accelerate(Kept()), problem()
    model.local_ensemble = False
    assert not is_fused(model, *args)
    accelerate(model)
    assert is_fused(model, *args)
    assert_close(model(*args), original(model, *args))


def test_switches_of_the_decoder_are_watched():
    class Switch(Kept):
        def __init__(self):
            super().__init__()
            self.residual = False

        def query_rgb(self, coord, cell=None):
            return super().query_rgb(coord, cell) + self.residual

    model, args = accelerate(Switch()), problem()
    assert is_fused(model, *args)
    model.residual = True
    with without_cuda():
        assert torch.equal(model(*args), original(model, *args))


@pytest.mark.parametrize(
    "wrong", [{"coord": torch.rand(2, 3)}, {"coord": torch.rand(3, 40, 2)}, {"cell": None}], ids=str
)
def test_errors_are_the_originals(wrong):
    inp, coord, cell = problem()
    model, call = accelerate(Kept()), {"inp": inp, "coord": coord, "cell": cell} | wrong
    with pytest.raises((RuntimeError, IndexError, AttributeError, TypeError)) as theirs:
        original(model, **call)
    with without_cuda(), pytest.raises(type(theirs.value)) as ours:
        model(**call)
    assert str(ours.value) == str(theirs.value)
