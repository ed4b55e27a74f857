"""accelerate and restore on LaMa's layers as other projects define them."""

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
import upstream_lama
from torch import nn
from torch.nn.utils import prune
from upstream_lama import DIFFERENT, FFC, FFC_BN_ACT, FFCResnetBlock, FourierUnit, Generator, whole_generator

from inr_kernels import accelerate
from inr_kernels.integrations import restore

X = torch.randn(2, 4, 12, 18, generator=torch.Generator().manual_seed(2))


def random_norms(model):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
    return model


def same(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"spatial_scale_factor": 0.5}, {"fft_norm": "backward"}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_output_gradients_and_buffers_match_the_original(training, options, caplog):
    model = random_norms(Generator(**options)).train(training)
    original, keys = copy.deepcopy(model), list(model.state_dict())
    with caplog.at_level(logging.INFO, "inr_kernels"):
        assert accelerate(model) is model
    assert len(caplog.messages) == 18 and all("accelerated: LaMa's Fourier convolution" in m for m in caplog.messages)
    block = model[1]
    assert type(block) is FFCResnetBlock and isinstance(block.conv1, FFC_BN_ACT) and isinstance(block.conv1.ffc, FFC)
    assert isinstance(block.conv1.ffc.convg2g.fu, FourierUnit) and list(model.state_dict()) == keys
    runs = []
    for run in (model, original):
        leaf = X.clone().requires_grad_()
        out = run(leaf)
        grads = torch.autograd.grad(sum(part.square().sum() for part in out), [leaf, *run.parameters()])
        runs.append([*out, *(g / g.norm() for g in grads), *run.buffers()])
    same(*runs, tolerance=1e-3)


def test_runs_our_kernels_until_restored(monkeypatch):
    model = accelerate(random_norms(Generator()).eval())
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(X)
    names = {event.key for event in profile.key_averages()}
    assert {"inr_kernels::fourier_unit", "inr_kernels::conv3x3"} <= names
    assert "aten::batch_norm" not in names  # every norm is folded into the layer before it
    restore(model)
    assert all(type(module).__module__ in ("upstream_lama", *_torchs(module)) for module in model.modules())
    assert not any(hasattr(module, "_inr_original") for module in model.modules())
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(X)
    assert not [event.key for event in profile.key_averages() if "inr_kernels" in event.key]


def test_a_whole_generator_is_fused_until_restored():
    model = random_norms(whole_generator()).eval().requires_grad_(False)
    original, x = copy.deepcopy(model), X.clone().requires_grad_()
    accelerate(model)
    with torch.profiler.profile() as profile:
        out = model(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["inr_kernels::conv2d"] >= 4 and not {"aten::batch_norm", "aten::conv_transpose2d"} & set(counts)
    same([out, torch.autograd.grad(out.sum(), x)[0]], [y := original(x), torch.autograd.grad(y.sum(), x)[0]])
    assert type(pickle.loads(pickle.dumps(model))) is type(model) and list(model.state_dict()) == [
        *original.state_dict()
    ]
    model.train()
    same([model(x)], [original.train()(x)])
    assert type(restore(model)) is nn.Sequential


def test_a_generator_with_a_patched_forward_is_not_accelerated(caplog):
    model = whole_generator()
    model.forward = model[0].forward
    accelerate(model)
    assert (
        type(model) is nn.Sequential
        and "Sequential not accelerated: forward is patched on the object" in caplog.messages
    )


def _torchs(module):
    return [type(module).__module__] if type(module).__module__.startswith("torch.") else []


@pytest.mark.parametrize("unit", DIFFERENT)
def test_other_units_are_not_accelerated(unit, caplog):
    module = unit(3, 4)
    with caplog.at_level(logging.INFO, "inr_kernels"):
        accelerate(module)
    assert caplog.messages == [f"{unit.__name__} not accelerated: {DIFFERENT[unit]}"]
    assert type(module) is unit


def test_later_hooks_and_layers_use_the_original():
    model = accelerate(random_norms(Generator()).eval())
    unit, seen = model[2].conv2.ffc.convg2g.fu, []
    unit.bn.register_forward_hook(lambda *_: seen.append("bn"))
    model[1].conv1.ffc.convg2l.register_forward_hook(lambda *_: seen.append("conv"))
    model[1].conv1.act_g = nn.LeakyReLU()
    with torch.no_grad():
        ours = model(X)
        assert sorted(seen) == ["bn", "conv"]
        same(ours, restore(model)(X))


def conv(model):
    model[1].conv1.ffc.convg2g = nn.Conv2d(12, 12, 3, padding=1)


def flag(model):
    model[1].conv1.ffc.convg2g.fu.spectral_pos_encoding = 1


def pruned(model):
    prune.random_unstructured(model[1].conv2.ffc.convg2g.fu.conv_layer, "weight", 0.5)
    with torch.no_grad():
        model[1].conv2.ffc.convg2g.fu.conv_layer.weight_orig.mul_(3)


def patched(model):
    norm = model[1].conv2.ffc.convg2g.fu.bn
    norm.forward = lambda x, forward=norm.forward: 2 * forward(x)


@pytest.mark.parametrize("change", [conv, flag, pruned, patched])
def test_later_changes_use_the_original(change):
    model = accelerate(random_norms(Generator()).eval())
    change(model)
    with torch.no_grad():
        ours = model(X)
        same(ours, restore(model)(X))


@pytest.mark.parametrize("kind", [FFC_BN_ACT, FFC, upstream_lama.SpectralTransform, FourierUnit])
def test_a_changed_forward_of_the_class_uses_the_original(kind, monkeypatch):
    model, forward = accelerate(random_norms(Generator()).eval()), kind.forward

    def other(self, x):
        out = forward(self, x)
        return tuple(part + 1 for part in out) if isinstance(out, tuple) else out + 1

    with torch.no_grad():
        monkeypatch.setattr(kind, "forward", other)
        ours = model(X)
        same(ours, restore(model)(X))


def test_a_hook_on_all_modules_is_called():
    model, seen = accelerate(Generator().eval()), set()
    expected = {module for module in model.modules() if module is not model and not list(module.children())}
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module) and None)
    try:
        model(X)
    finally:
        hook.remove()
    assert expected - seen <= {module.gate for module in model.modules() if isinstance(module, FFC)}


def test_keeps_no_reference_to_the_model():
    model = nn.Sequential(FFCResnetBlock(24), FourierUnit(3, 5), *(unit(5, 7) for unit in DIFFERENT))
    accelerate(model)
    alive = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert not [reference() for reference in alive if reference() is not None]


def test_accelerated_layers_compile():
    block = accelerate(random_norms(FFCResnetBlock(16)).eval())
    x = torch.randn(1, 4, 6, 7), torch.randn(1, 12, 6, 7)
    with torch.no_grad():
        same(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_copies_and_pickles_are_accelerated():
    model = accelerate(random_norms(Generator()).eval())
    with torch.no_grad():
        expected = model(X)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert hasattr(other[1].conv1, "_inr_original") and hasattr(other[1].conv1.ffc.convg2g.fu, "_inr_original")
            same(other(X), expected)
    assert isinstance(pickle.loads(pickle.dumps(model))[0], upstream_lama.FFC_BN_ACT)


def test_verification_has_no_side_effects():
    model = Generator()
    state, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and model.training


def test_our_own_layers_are_not_candidates(caplog):
    from inr_kernels.models.lama import LaMa, LaMaConfig

    accelerate(LaMa(LaMaConfig(features=8, blocks=1)))
    assert caplog.messages == ["accelerate: LaMa already uses the operators of this package"]
