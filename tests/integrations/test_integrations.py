"""accelerate and restore on LIIF decoders: the same output as the original, or no change."""

import copy
import functools
import gc
import logging
import operator

import pytest
import torch
from integrations_cases import assert_not_accelerated
from local_implicit_cases import FLAGS
from torch import nn
from upstream_decoders import (
    UNSUPPORTED,
    Mlp,
    Residual,
    StoresFeatures,
    TakesFeatures,
    assert_close,
    is_accelerated,
    one_thread,  # noqa: F401  a fixture
    original,
    problem,
    without_cuda,
)

from inr_kernels import accelerate
from inr_kernels.integrations import class_swap, liif, probe, restore


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="inr_kernels")
    return caplog


BOTH = pytest.mark.parametrize("cls", [StoresFeatures, TakesFeatures])


@BOTH
@pytest.mark.parametrize(("unfold", "ensemble", "cell"), FLAGS)
def test_output_and_gradients_match_the_original(cls, unfold, ensemble, cell):
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
    assert is_accelerated(model, *args)
    if not cell:
        assert_close(model(*args[:2], None), ours)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_decoders_are_not_accelerated(name, log):
    build, reason = UNSUPPORTED[name]
    assert_not_accelerated(build(), reason, log)


def test_log_names_the_accelerated_module(log):
    accelerate(nn.ModuleDict({"generator": TakesFeatures(), "other": nn.Linear(2, 2)}))
    (record,) = log.records
    assert (record.levelname, record.getMessage()) == (
        "INFO",
        "TakesFeatures at 'generator' accelerated: LIIF's decoder",
    )


def test_one_line_says_what_was_replaced(caplog):
    """At the default level."""
    caplog.set_level(logging.WARNING, logger="inr_kernels")
    accelerate(nn.ModuleDict({"a": TakesFeatures(), "b": TakesFeatures(), "c": nn.Linear(2, 2)}))
    assert caplog.messages == ["accelerate replaced in ModuleDict: LIIF's decoder (2)"]


def test_no_supported_module(log):
    accelerate(nn.Linear(2, 2))
    assert log.messages == ["accelerate found no supported module in Linear"]
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
            function("liif")


class Slow(nn.Module):
    def forward(self, x):
        return x + x


class Fast(class_swap.AcceleratedModule):
    def forward(self, x):
        if class_swap.falls_back(self, class_swap.why_changed(self)):
            return super().forward(x)
        return 2 * x


def verify_slow(module):
    class_swap.check_method(module, "forward", [(("x",),)])
    with probe.sandbox() as random:
        leaves = [random((3,))]
        copied = probe.without_weights(module, {})
        if reason := probe.why_different(
            copied, lambda _: copied.forward(*leaves), lambda _: 2 * leaves[0], leaves, random
        ):
            raise class_swap.Unsupported(reason)
    return class_swap.match(module, Fast, "forward")


def test_an_adapter_needs_only_to_be_registered(request, log):
    class Slower(Slow):
        def forward(self, x):
            return x + x + x

    adapter = class_swap.Adapter("doubling", lambda module: isinstance(module, Slow), verify_slow)
    class_swap.register(adapter)
    request.addfinalizer(lambda: class_swap.ADAPTERS.remove(adapter))
    model = accelerate(nn.Sequential(Slow(), Slower()))
    assert log.messages == [
        "Slow at '0' accelerated: doubling",
        f"{Slower.__qualname__} at '1' not accelerated: its output differs on random inputs",
    ]
    assert [isinstance(module, Fast) for module in model] == [True, False]
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 6.0))


@BOTH
def test_restore_undoes_everything(cls):
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


def test_verification_has_no_side_effects():
    model = StoresFeatures().double().requires_grad_(False)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        accelerate(model)
    assert class_swap.AcceleratedModule in type(model).__mro__
    assert torch.equal(rng, torch.get_rng_state())
    assert "feat" not in vars(model)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_verification_runs_on_the_cpu():
    class MovesToCuda(StoresFeatures):
        def query_rgb(self, coord, cell=None):
            coord = coord.to("cuda") + torch.zeros(2, device=torch.device("cuda", 0))
            return super().query_rgb(coord.cuda(0), cell.to(device="cuda:0"))

    assert isinstance(accelerate(MovesToCuda()), class_swap.AcceleratedModule)


def test_verification_does_not_depend_on_the_weights():
    with torch.device("meta"):
        model = accelerate(StoresFeatures())
    assert isinstance(model, class_swap.AcceleratedModule)
    model = StoresFeatures()
    nn.init.zeros_(model.imnet.layers[-1].weight)
    assert isinstance(accelerate(model), class_swap.AcceleratedModule)


def test_float64_uses_the_original():
    model = accelerate(TakesFeatures().double())
    args = [t.double() for t in problem()]
    assert torch.equal(model(*args), original(model, *args))


@BOTH
def test_chunks_compute_the_first_layer_once(cls):
    model, (inp, coord, cell) = accelerate(cls()), problem()
    with torch.no_grad():
        if cls is TakesFeatures:
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


def test_cache_is_freed_with_its_model():
    gc.collect()  # of earlier tests' models
    model = accelerate(StoresFeatures())
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
def test_later_changes_use_the_original(cls, change, log):
    cls = type("Fresh", (cls,), {"query_rgb": cls.query_rgb})
    model, args = accelerate(cls()), problem()
    assert is_accelerated(model, *args)
    change(model)
    log.clear()
    with without_cuda():
        ours = [model(*args), model(*args)]
    theirs = original(model, *args)
    assert torch.equal(ours[0], theirs)
    assert (
        len(
            [
                message
                for message in log.messages
                if message.startswith("Fresh uses its original method for some calls: ")
            ]
        )
        == 1
    )


@BOTH
def test_a_hook_on_all_modules_uses_the_original(cls):
    model, args = accelerate(cls()), problem()
    hook = nn.modules.module.register_module_forward_hook(lambda m, _, out: 2 * out if type(m) is nn.Linear else None)
    try:
        with without_cuda():
            assert torch.equal(model(*args), original(model, *args))
    finally:
        hook.remove()
    assert is_accelerated(model, *args)


@BOTH
def test_supported_changes_stay_accelerated(cls):
    model, args = accelerate(cls()), problem()
    inputs = model.imnet.layers[0].in_features
    model.imnet = Mlp(inputs, 5, hidden=(8, 7, 6))
    model.eval_bsize = 3
    assert is_accelerated(model, *args)
    assert_close(model(*args), original(model, *args))


def test_accelerate_accepts_a_changed_flag():
    model, args = accelerate(StoresFeatures()), problem()
    model.local_ensemble = False
    assert not is_accelerated(model, *args)
    accelerate(model)
    assert is_accelerated(model, *args)
    assert_close(model(*args), original(model, *args))


def test_a_changed_flag_of_a_subclass_uses_the_original():
    class Switch(StoresFeatures):
        def __init__(self):
            super().__init__()
            self.residual = False

        def query_rgb(self, coord, cell=None):
            return super().query_rgb(coord, cell) + self.residual

    model, args = accelerate(Switch()), problem()
    assert is_accelerated(model, *args)
    model.residual = True
    with without_cuda():
        assert torch.equal(model(*args), original(model, *args))


def scaled(module, x):
    return x * module.scale


class Wrapper:
    """A decorator that is a class."""

    def __init__(self, function):
        self.function = function

    def __get__(self, module, cls=None):
        return self if module is None else functools.partial(self.function, module)


@pytest.mark.parametrize(
    "method",
    [
        functools.partialmethod(scaled),
        functools.lru_cache(scaled),
        functools.singledispatchmethod(scaled),
        torch.no_grad()(scaled),
        Wrapper(scaled),
        lambda self, x, inner=scaled: inner(self, x),
        lambda self, x: partial_of_scaled(self, x),
        property(operator.attrgetter("scale")),
    ],
    ids=["partial", "cache", "dispatch", "decorator", "class", "default", "global", "builtin"],
)
def test_flags_that_a_method_reads_are_found(method):
    model = type("Model", (nn.Module,), {"method": method})()
    model.scale = 2
    assert class_swap.read_attributes(model, "method") == {"scale": 2}


partial_of_scaled = functools.partial(scaled)


def test_flags_that_a_method_does_not_read_may_change():
    model = type("Model", (nn.Module,), {"method": functools.partialmethod(scaled)})()
    model.calls = 1
    assert not class_swap.read_attributes(model, "method")


@pytest.mark.parametrize(
    "wrong",
    [{"coord": torch.rand(2, 3)}, {"coord": torch.rand(3, 40, 2)}, {"cell": None}],
    ids=["two dimensions", "another batch", "no cell"],
)
def test_errors_match_the_original(wrong):
    inp, coord, cell = problem()
    model, call = accelerate(StoresFeatures()), {"inp": inp, "coord": coord, "cell": cell} | wrong
    with pytest.raises((RuntimeError, IndexError, AttributeError, TypeError)) as theirs:
        original(model, **call)
    with without_cuda(), pytest.raises(type(theirs.value)) as ours:
        model(**call)
    assert str(ours.value) == str(theirs.value)
