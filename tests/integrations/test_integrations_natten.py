"""accelerate on neighborhood attention of other projects: the same output and gradients, or no change."""

import copy
import logging
import pickle

import pytest
import torch
import upstream_natten
from integrations_cases import assert_not_accelerated
from torch import nn
from upstream_natten import (
    UNSUPPORTED,
    CallsInHelper,
    Dinat,
    Nat,
    Network,
    NotInstalled,
    Version15,
    Version17,
    Version21,
    Version142,
    Version146,
)

import inr_kernels
from inr_kernels import accelerate
from inr_kernels._core import dispatch
from inr_kernels.integrations import class_swap, natten, restore

PADDED = (Version15, Version146, Version142)
KINDS = (Version21, Version17, *PADDED, Dinat, Nat)
EACH = pytest.mark.parametrize("cls", KINDS)


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="inr_kernels")
    return caplog


@pytest.fixture
def no_cached_results(monkeypatch):
    """Starts the test without the results of earlier verifications."""
    monkeypatch.setattr(natten, "_VERIFIED", {})


@pytest.fixture
def no_kernels(monkeypatch, no_cached_results):
    """A machine without NATTEN's kernels; calling the fixture's value installs them."""
    monkeypatch.setattr(upstream_natten, "RUNS", False)
    return lambda: monkeypatch.setattr(upstream_natten, "RUNS", True)


def is_accelerated(model, *args):
    """Whether a call runs on our op."""
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        for name in ("neighborhood_attention_2d", "neighborhood_attention_2d_packed"):
            function = getattr(inr_kernels, name)
            patch.setattr(natten, name, lambda *a, f=function, **k: calls.append(a) or f(*a, **k))
        model(*args)
    return bool(calls)


def original(model):
    """The object with its original class."""
    twin = object.__new__(model._inr_original)
    vars(twin).update(vars(model))
    return twin


def feature(height, width, channels=8, dtype=torch.float32, batch=2):
    return torch.randn(batch, height, width, channels).to(dtype).requires_grad_()


def results(model, x):
    """The output and the gradients of the argument and the parameters, except the gradient of the key's bias: zero."""
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    leaves = [x, *(p for name, p in model.named_parameters() if name != "key.bias")]
    return [out, *torch.autograd.grad(out.sin().sum(), leaves)]


def assert_same(model, x, tolerance=1e-5):
    """The accelerated model runs on our op, and its output and gradients match the original."""
    assert is_accelerated(model, x)
    for ours, theirs in zip(results(model, x), results(original(model), x), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


CASES = [
    *(
        (cls, {"kernel_size": k, "dilation": d})
        for cls in (Version21, Version17, *PADDED, Dinat)
        for k, d in [(3, 2), (5, 1)]
    ),
    (Version21, {"kernel_size": (4, 3), "dilation": (1, 2), "stride": (3, 2)}),
    (Version21, {"kernel_size": (5, 3), "is_causal": (True, False), "qkv_bias": False}),
    (Version21, {"kernel_size": 2, "stride": 2, "is_causal": True, "qk_scale": 0.2}),
    (Version17, {"kernel_size": (3, 5), "is_causal": (False, True)}),
    (Version17, {"kernel_size": (5, 3), "dilation": (1, 2), "rel_pos_bias": True}),
    (Version15, {"kernel_size": 3, "dilation": 3, "bias": False, "qkv_bias": False}),
    (Version146, {"kernel_size": 7, "qk_scale": 0.5}),
    (Dinat, {"kernel_size": 5, "dilation": 2, "qkv_bias": False}),
    (Nat, {"kernel_size": 7}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cls", "options"), CASES, ids=str)
def test_output_and_gradients_match_the_original(cls, options, dtype, log):
    model = cls(8, 2, **options).to(dtype)
    keys = list(model.state_dict())
    assert accelerate(model) is model
    assert log.messages == [f"{cls.__name__} accelerated: neighborhood attention"]
    assert isinstance(model, cls)
    assert list(model.state_dict()) == keys
    for size in ((10, 13), (11, 10)):
        assert_same(model, feature(*size, dtype=dtype), 1e-5 if dtype == torch.float32 else 1e-12)


@EACH
def test_runs_where_the_original_cannot(cls, no_kernels):
    x, model = feature(6, 7), accelerate(cls(8, 2, 3))
    with pytest.raises(NotInstalled):
        original(model)(x)
    assert is_accelerated(model, x)
    no_kernels()
    assert_same(model, x)


@pytest.mark.parametrize("cls", PADDED)
@pytest.mark.parametrize("size", [(5, 9), (9, 5), (1, 1), (2, 20)])
def test_small_maps_are_padded_as_in_the_original(cls, size):
    assert_same(accelerate(cls(8, 2, 3, dilation=2)), feature(*size))


@pytest.mark.parametrize("cls", [Version21, Version17, Dinat])
def test_small_maps_raise_as_in_the_original(cls, log):
    model = accelerate(cls(8, 2, 3, dilation=2))
    for run in (model, original(model)):
        with pytest.raises(ValueError, match=r"a window of .* does not fit into \(5, 9\)"):
            run(feature(5, 9))
    assert log.messages[-1].endswith("the input of a call is not [B, H, W, 8] or is smaller than the window")


@pytest.mark.parametrize("fused", [False, True])
def test_version_17_fused_or_not(fused, monkeypatch):
    monkeypatch.setattr(upstream_natten, "is_fna_enabled", lambda: fused)
    assert_same(accelerate(Version17(8, 2, 3, rel_pos_bias=True)), feature(5, 6))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_attentions_are_not_accelerated(name, log):
    build, reason = UNSUPPORTED[name]
    assert_not_accelerated(build(), reason, log)


@pytest.mark.parametrize("name", ["plus input", "gate", "padding", "sharper", "undilated", "smaller sum", "detached"])
def test_other_attentions_are_not_accelerated_without_kernels(name, no_kernels):
    model = UNSUPPORTED[name][0]()
    assert type(accelerate(model)) is type(model)
    assert not isinstance(model, class_swap.AcceleratedModule)


def test_calls_outside_of_forward_need_kernels(no_kernels, log):
    model = accelerate(CallsInHelper(8, 2, 3))
    assert type(model) is CallsInHelper
    no_kernels()
    assert_same(accelerate(model), feature(6, 7))


def test_a_kernel_with_other_results_is_detected(monkeypatch, log):
    whole = upstream_natten.na2d_av
    monkeypatch.setattr(upstream_natten, "na2d_av", lambda *args, **options: 2 * whole(*args, **options))
    assert type(accelerate(Version17(8, 2, 3))) is Version17
    assert "its output differs on random inputs" in log.messages[-1]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Version15(8, 2, 3, attn_drop=0.5), "attn_drop"),
        (Version17(8, 2, 3, attn_drop=0.5), "attn_drop"),
        (Dinat(8, 2, 3, drop=0.5), "dropout"),
    ],
)
def test_attention_dropout_in_training_uses_the_original(model, name, log):
    x, runs = feature(6, 7), []
    assert_same(accelerate(model).eval(), x)
    assert not is_accelerated(model.train(), x)
    for run in (model, original(model)):
        torch.manual_seed(3)
        runs.append(run(x)[0])
    assert torch.equal(*runs)
    assert log.messages[-1].endswith(
        f"uses its original method for some calls: {name} drops attention weights in training"
    )


def test_dropout_of_the_output():
    model, x = accelerate(Version21(8, 2, 3, proj_drop=0.5)), feature(6, 7)
    runs = []
    for run in (model.train(), original(model)):
        torch.manual_seed(3)
        runs.append(run(x))
    torch.testing.assert_close(*runs)
    assert (runs[0] == 0).any()


def test_hooks_on_the_layers_are_called():
    model, x, seen = accelerate(Version15(8, 2, 3)), feature(6, 7), []
    for layer in (model, model.qkv, model.proj, model.proj_drop):
        layer.register_forward_hook(lambda module, *_: seen.append(module))
    assert is_accelerated(model, x)
    assert seen == [model.qkv, model.proj, model.proj_drop, model]
    model.attn_drop.register_forward_hook(lambda module, *_: seen.append(module))
    assert not is_accelerated(model, x)
    assert seen[-4:] == [model.attn_drop, model.proj, model.proj_drop, model]


def test_a_hook_on_all_modules_is_called():
    new, old, x = accelerate(Version21(8, 2, 3)), accelerate(Version15(8, 2, 3)), feature(6, 7)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert is_accelerated(new, x)  # it calls every module
        assert not is_accelerated(old, x)
    finally:
        hook.remove()
    assert is_accelerated(old, x)


def test_attention_weights_come_from_the_original(log):
    model, x = accelerate(Dinat(8, 2, 3)), feature(6, 7)
    out, weights = model(x, True)
    assert weights.shape == (2, 2, 6, 7, 9)
    torch.testing.assert_close(out, model(x, output_attentions=False)[0])
    assert log.messages[-1].endswith("output_attentions requests the weights")


def test_other_devices_use_the_original_unless_a_backend_is_requested(log, monkeypatch):
    model = accelerate(Version21(8, 2, 3)).to("meta")
    monkeypatch.setattr(upstream_natten, "neighborhood_attention_generic", lambda query, *_, **__: query)
    x = feature(6, 7).to("meta")
    assert not is_accelerated(model, x)
    reason = "on meta our kernels are off: run `inr-kernels prove`, or with inr_kernels.backend('triton'):"
    assert reason in log.messages[-1]
    with inr_kernels.backend("reference"):
        assert natten._why_not_this_call(model, x) == ""
    monkeypatch.setattr(dispatch.Op, "default", lambda op, facts: "triton")  # as by a verdict
    assert natten._why_not_this_call(model, x) == ""


def dilate(model):
    model.dilation = 2


def lose_a_head(model):
    name = "num_heads" if hasattr(model, "num_heads") else "num_attention_heads"
    setattr(model, name, 1)


def other_forward(model):
    original_class = type(model).__bases__[-1]
    original_class.forward = lambda self, x, *_: x.sin()


@pytest.mark.parametrize("cls", [Version15, Dinat])
@pytest.mark.parametrize("change", [dilate, lose_a_head, other_forward])
def test_later_changes_use_the_original(cls, change, log):
    cls = type("Fresh", (cls,), {"forward": cls.forward})
    model, x = accelerate(cls(8, 2, 3)), feature(6, 7)
    assert is_accelerated(model, x)
    change(model)
    outcomes = []
    for run in (model, original(model)):
        try:
            outcomes.append(run(x)[0])
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] if isinstance(outcomes[0], str) else torch.equal(*outcomes)
    assert log.messages[-1].startswith("Fresh uses its original method for some calls: ")


def test_equal_layers_are_verified_once(monkeypatch, no_cached_results, log):
    compared, compare = [], natten._pads_small_maps
    monkeypatch.setattr(natten, "_pads_small_maps", lambda *args: compared.append(args) or compare(*args))
    model = accelerate(Network(Version17))
    assert len(compared) == 2
    assert len(log.messages) == 4
    accelerate(restore(model))
    assert len(compared) == 2
    accelerate(Version17(8, 2, 3, qkv_bias=False))
    odd = Version17(8, 2, 3)
    odd.config = nn.ModuleDict  # an attribute of unknown effect
    accelerate(nn.Sequential(odd, copy.deepcopy(odd)))
    assert len(compared) == 5


def test_a_changed_class_is_verified_again(monkeypatch):
    class Fresh(Version15):
        """A class whose helper a test changes."""

        def padded(self, x):
            return super().padded(x)

    accelerate(Fresh(8, 2, 3))
    monkeypatch.setattr(Fresh, "padded", lambda self, x: Version15.padded(self, 2 * x))
    assert type(accelerate(Fresh(8, 2, 3))) is Fresh


@EACH
def test_a_network_trains(cls):
    model = Network(cls if cls is not Nat else lambda *args, dilation: Nat(*args))
    image, twin = torch.randn(2, 3, 15, 18), copy.deepcopy(model)
    accelerate(model)
    assert all(isinstance(layer, class_swap.AcceleratedModule) for layer in model.layers)
    losses = []
    for network in (model, twin):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            loss = network(image).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    twin.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model(image), twin(image), rtol=1e-4, atol=1e-5)


@EACH
def test_restore_undoes_everything(cls):
    model, x = cls(8, 2, 3), feature(6, 7)
    before, state = dict(vars(model)), model.state_dict()
    assert accelerate(accelerate(model)) is model
    assert repr(model) == repr(original(model))
    model(x)
    assert list(model.state_dict()) == list(state)
    assert restore(restore(model)) is model
    assert type(model) is cls
    assert vars(model) == before


@EACH
def test_copies_and_pickles(cls, log):
    model, x = accelerate(cls(8, 2, 3)), feature(6, 7)
    log.clear()
    for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert_same(twin, x)
    assert not log.records


@EACH
def test_compiles_without_graph_breaks(cls):
    model, x = accelerate(cls(8, 2, 3)), feature(6, 7)
    theirs, ours = model(x), torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(ours, theirs)
    torch.compiler.reset()


@EACH
def test_half_precision_and_autocast(cls):
    model, x = accelerate(cls(8, 2, 3)), feature(6, 7)
    exact, half = results(original(model), x), copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(model, x)
    for runs in (cast, results(half, x.bfloat16())):
        assert runs[0].dtype == torch.bfloat16
        for ours, truth in zip(runs, exact, strict=True):
            assert (ours.float() - truth).norm() <= 0.03 * truth.norm()


def test_verification_has_no_side_effects():
    model = Version15(8, 2, 3).double().requires_grad_(False)
    state, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        accelerate(model)
    assert isinstance(model, class_swap.AcceleratedModule)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    with torch.device("meta"):
        assert isinstance(accelerate(Dinat(8, 2, 3)), class_swap.AcceleratedModule)


def test_large_windows_are_compared_as_smaller_ones():
    """A map for this window would have 36 million pixels."""
    model = accelerate(Version21(8, 2, (81, 80), dilation=75, stride=64, is_causal=(False, True)))
    assert isinstance(model, class_swap.AcceleratedModule)


def test_our_own_module_is_not_a_candidate(log):
    accelerate(inr_kernels.NeighborhoodAttention2D(8, 2, 3))
    assert log.messages == ["accelerate: NeighborhoodAttention2D already uses the operators of this package"]
