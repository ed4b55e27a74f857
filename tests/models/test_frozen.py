"""Copies of networks for gradients of their features: equal results, constant weights, little kept for the backward."""

import pytest
import torch
from test_inpainter import NETWORKS, every_network, example, network
from test_lama import OPTIONS, RATIOS, TINY, random_norms
from torch import nn

import inr_kernels
from inr_kernels.fourier_unit import FFC_BN_ACT, frozen
from inr_kernels.models import IN2, IN2Config, LaMa, LaMaConfig
from inr_kernels.models.common.constant import constant
from inr_kernels.models.common.frozen import InBands, Recomputed, frozen_copy, measured
from inr_kernels.models.lama import network as lama_network

SUPPORTED = ["LaMa's", "zeros", "biases"]


def leaves(*shapes, dtype=torch.double):
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def with_gradients(run, x):
    """The outputs of run(x), and the gradients of x."""
    out = run(x)
    weights = [torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view(part.shape) for part in out]
    return *out, *torch.autograd.grad(out, x, weights)


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, b) for name in SUPPORTED for b in ("cpu", "reference")), ("LaMa's", "triton")]
)
def test_frozen_layer_is_the_layer(name, backend):
    dtype = torch.float if backend == "triton" else torch.double
    options = {"padding": 1, "activation_layer": nn.ReLU} | RATIOS | OPTIONS[name]
    layer = random_norms(FFC_BN_ACT(16, 16, 3, **options)).to(dtype).eval()
    x = leaves((2, 4, 6, 7), (2, 12, 6, 7), dtype=dtype)
    constant = frozen(layer)
    assert constant is not layer
    with inr_kernels.backend(backend):
        for ours, theirs in zip(with_gradients(constant, x), with_gradients(layer, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 if backend == "triton" else 1e-10)


@pytest.mark.parametrize("name", SUPPORTED)
def test_layer_without_weight_gradients(name):
    """It is computed with folded weights where only its input's gradient is needed."""
    options = {"padding": 1, "activation_layer": nn.ReLU} | RATIOS | OPTIONS[name]
    layer = random_norms(FFC_BN_ACT(16, 16, 3, **options)).double().eval()
    x = leaves((2, 4, 6, 7), (2, 12, 6, 7))
    expected = with_gradients(layer, x)
    layer.requires_grad_(False)
    for ours, theirs in zip(with_gradients(layer, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)
    assert "InputGradient" in layer(x)[0].grad_fn.name()
    with pytest.raises(ValueError, match="x's global part must have the local part's batch 2 and size"):
        layer((x[0], x[1][..., 1:]))


def test_layer_without_weight_gradients_under_transforms():
    """torch.compile, torch.func and the twice differentiable reference see the layer's ops."""
    options = {"padding": 1, "activation_layer": nn.ReLU} | RATIOS
    layer = random_norms(FFC_BN_ACT(16, 16, 3, **options)).eval().requires_grad_(False)
    x = leaves((1, 4, 6, 7), (1, 12, 6, 7), dtype=torch.float)
    expected = with_gradients(layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(with_gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.func.grad(lambda local: sum(part.sum() for part in layer((local, x[1].detach()))))(x[0].detach())
    with inr_kernels.backend("reference"):
        (first,) = torch.autograd.grad((layer(x)[0] ** 2).sum(), x[0], create_graph=True)
        assert torch.autograd.grad(first.sum(), x[0])[0].any()


def test_frozen_layer_keeps_a_bit_per_activation():
    layer = frozen(FFC_BN_ACT(16, 16, 3, padding=1, activation_layer=nn.ReLU, **RATIOS).eval())
    x = leaves((1, 4, 32, 32), (1, 12, 32, 32), dtype=torch.float)
    with measured(layer) as storages:
        layer(x)
    spectrum = 2 * 6 * 32 * 17
    assert sum(storages.values()) == (16 * 32 * 32 + 6 * 32 * 32 + spectrum) // 8


@pytest.mark.parametrize("name", [*sorted(OPTIONS.keys() - SUPPORTED), "training", "a hook", "gated", "local units"])
def test_other_layers_stay(name):
    more = {"gated": {"gated": True}, "local units": {"enable_lfu": True}}.get(name, OPTIONS.get(name, {}))
    layer = FFC_BN_ACT(16, 16, 3, **{"padding": 1, "activation_layer": nn.ReLU} | RATIOS | more)
    layer.train(name == "training")
    if name == "a hook":
        layer.ffc.convg2g.fu.register_forward_hook(lambda *_: None)
    assert frozen(layer) is layer


def test_half_precision():
    layer = random_norms(FFC_BN_ACT(16, 16, 3, padding=1, activation_layer=nn.ReLU, **RATIOS)).eval()
    x = leaves((1, 4, 6, 7), (1, 12, 6, 7), dtype=torch.float)
    exact = with_gradients(frozen(layer), x)
    half = with_gradients(frozen(layer.bfloat16()), [part.detach().bfloat16().requires_grad_() for part in x])
    for ours, theirs in zip(half, exact, strict=True):
        assert ours.dtype == torch.bfloat16 and (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_constant_convolutions():
    """Each group of layers becomes one; what they keep are bits."""
    chain = random_norms(
        nn.Sequential(
            nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(inplace=True),
            nn.Conv2d(5, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReflectionPad2d((1, 2, 3, 0)),
            nn.Conv2d(4, 8, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
        )
    )
    chain = chain.double().eval().requires_grad_(False)
    ours, x = nn.Sequential(*constant(chain)), leaves((2, 6, 7, 5))
    assert len(ours) == 4
    for new, old in zip(*(with_gradients(lambda x: (run(*x),), x) for run in (ours, chain)), strict=True):  # noqa: B023
        torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-10)
    with measured(ours) as storages:
        ours(*x)
    assert sum(storages.values()) == 2 * (5 * 14 * 10 + 8 * 17 * 13) // 8


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1, padding=1)], ids=str
)
def test_other_convolutions_stay(layer):
    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_hook(lambda *_: None)
    for part in (layer, hooked):
        layers = [nn.ReflectionPad2d(1), part, nn.BatchNorm2d(4).eval(), nn.ReLU()]
        assert constant(layers) == layers


@pytest.mark.parametrize("downsamplings", [1, 2, 3])
@pytest.mark.parametrize("size", [(90, 37), (64, 24)], ids=str)
def test_lama_in_bands(size, downsamplings, monkeypatch):
    """At every split, also at sizes that are no multiples of the step."""
    monkeypatch.setattr(lama_network, "MIN_BAND", 16)
    model = random_norms(LaMa(LaMaConfig(features=8, blocks=2, downsamplings=downsamplings))).double().eval()
    image, mask = torch.rand(1, 3, *size).double(), torch.rand(1, 1, *size) < 0.4
    for split in (0, model.split, model.split + 1, len(model.model) - 2):
        model.split = split
        constant = model.frozen(workspace=1)
        assert any(isinstance(layer, InBands) for layer in constant.model)
        features = [model.encode(image, mask), constant.encode(image, mask)]
        runs = []
        for run, parts in zip((model, constant), features, strict=True):
            parts = parts if isinstance(parts, tuple) else (parts,)
            z = tuple(part.detach().requires_grad_() for part in parts)
            runs.append((*z, *with_gradients(lambda z: (run.decode(z if len(z) > 1 else z[0], size),), z)))  # noqa: B023
        for ours, theirs in zip(*runs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_layers_with_hooks_see_the_whole_map():
    model, seen = LaMa(TINY).eval(), []
    model.model[-2].register_forward_hook(lambda module, inputs, out: seen.append(out.shape[2]))
    model.frozen(workspace=1).predict(torch.rand(1, 3, 144, 16), torch.zeros(1, 144, 16))
    assert seen == [144]


@every_network
def test_copies_leave_the_network_alone(name):
    model, (image, mask) = network(name).train(), example(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    constant = model.frozen()
    assert not any(p.requires_grad for p in constant.parameters()) and not constant.training
    assert all(p.requires_grad for p in model.parameters()) and model.training
    shared = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in frozen_copy(model).parameters()} == shared
    expected = model.eval().predict(image, mask)
    torch.testing.assert_close(constant.predict(image, mask), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_networks_made_in_inference_mode():
    with torch.inference_mode():
        model = NETWORKS["LaMa"]().eval()
    image, mask = example(1)
    z = tuple(part.requires_grad_() for part in model.frozen().encode(image, mask))
    assert torch.autograd.grad(model.frozen().decode(z, (21, 26)).sum(), z)[0].any()


def test_recomputed_stages():
    """The same gradients, from the inputs of the stages alone."""
    model = IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, hidden=(64, 64))).eval().frozen()
    image, mask = example(1)
    feat, grids, _ = model.encode(image, mask)
    kept, runs = [], []
    stages = [module for module in model.modules() if isinstance(module, Recomputed)]
    for active in (False, True):
        for stage in stages:
            stage.active, stage.measures = active, not active
        z = (feat.clone().requires_grad_(),)
        with measured(model) as storages:
            out = model.decode((z[0], grids), (21, 26))
        kept.append(sum(storages.values()) + (0 if active else sum(stage.kept for stage in stages)))
        runs.append(torch.autograd.grad(out.sum(), z)[0])
    assert len(stages) == 2 and kept[1] < kept[0] / 2
    assert torch.equal(*runs)
