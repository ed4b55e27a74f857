"""The fused forwards fall back to calling the modules where these do more: hooks, other types, patched methods."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from inr_kernels import backend
from inr_kernels.fourier_unit import FFC, FFC_BN_ACT, FourierUnit, FusedSequential, SpectralTransform
from inr_kernels.fourier_unit.module import fused

X = torch.randn(2, 4, 10, 12), torch.randn(2, 12, 10, 12)


def norms(module):
    """Gives the batch norms random running statistics."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
    return module


def twice(_, args, out):
    """A forward hook."""
    return 2 * out


def patch(module):
    """Replaces the forward of one object."""
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)


def unit_by_modules(unit, x):
    z = torch.view_as_real(torch.fft.rfft2(x, norm="ortho")).permute(0, 1, 4, 2, 3).flatten(1, 2)
    z = unit.bn(unit.conv_layer(z)).relu().unflatten(1, (-1, 2))
    return torch.fft.irfft2(torch.complex(z[:, :, 0], z[:, :, 1]), s=x.shape[2:], norm="ortho")


def pruned(unit):
    prune.random_unstructured(unit.conv_layer, "weight", 0.5)
    with torch.no_grad():
        unit.conv_layer.weight_orig.mul_(3)


class Doubling(nn.BatchNorm2d):
    """A batch norm of another class."""

    def forward(self, x):
        return 2 * super().forward(x)


UNITS = {
    "a hook on the convolution": lambda unit: unit.conv_layer.register_forward_hook(twice),
    "a hook before the norm": lambda unit: unit.bn.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
    "pruning": pruned,
    "a patched convolution": lambda unit: patch(unit.conv_layer),
    "a patched norm": lambda unit: patch(unit.bn),
    "another norm": lambda unit: setattr(unit, "bn", norms(Doubling(10)).train(unit.training)),
    "a norm without weights": lambda unit: setattr(unit, "bn", nn.BatchNorm2d(10, affine=False).train(unit.training)),
    "a norm for channels": lambda unit: setattr(unit, "bn", nn.GroupNorm(2, 10)),
    "a bias": lambda unit: setattr(unit, "conv_layer", nn.Conv2d(8, 10, 1)),
    "a parametrized weight": lambda unit: nn.utils.parametrizations.weight_norm(unit.conv_layer),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", UNITS)
def test_unit_calls_modules_that_cannot_be_fused(name, training):
    unit = norms(FourierUnit(4, 5)).train(training)
    UNITS[name](unit)
    torch.testing.assert_close(unit(X[0]), unit_by_modules(unit, X[0]), rtol=1e-4, atol=1e-5)


def test_a_synchronized_norm_is_called(monkeypatch):
    """In training it communicates with other processes."""
    unit, seen, forward = nn.SyncBatchNorm.convert_sync_batchnorm(FourierUnit(4, 5)), [], nn.SyncBatchNorm.forward
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: seen.append(self) or forward(self, x))
    assert unit(X[0]).shape == (2, 5, 10, 12) and seen == [unit.bn]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_called_modules_in_half_precision(dtype):
    unit = norms(FourierUnit(4, 5)).eval()
    exact = 2 * unit(X[0])
    unit.register_forward_hook(twice)
    unit.conv_layer.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", dtype=dtype):
        cast = unit(X[0])
    for out in (cast, unit.to(dtype)(X[0].to(dtype))):
        assert out.dtype == dtype
        assert (out - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


def layer():
    return norms(FFC_BN_ACT(16, 16, 3, 0.75, 0.75, padding=1, activation_layer=nn.ReLU, enable_lfu=False)).eval()


def by_modules(layer, x):
    """The layer by calls of its modules, as in LaMa."""
    ffc, (x_l, x_g) = layer.ffc, x
    out_l, out_g = ffc.convl2l(x_l) + ffc.convg2l(x_g), ffc.convl2g(x_l) + ffc.convg2g(x_g)
    return layer.act_l(layer.bn_l(out_l)), layer.act_g(layer.bn_g(out_g))


class Halved(SpectralTransform):
    """A subclass with another forward."""

    def forward(self, x):
        return super().forward(x) / 2


PARTS = {
    "a patched convolution": lambda layer: patch(layer.ffc.convl2g),
    "a patched transform": lambda layer: patch(layer.ffc.convg2g),
    "a hook on the transform": lambda layer: layer.ffc.convg2g.register_forward_hook(twice),
    "another transform": lambda layer: setattr(layer.ffc, "convg2g", norms(Halved(12, 12, enable_lfu=False)).eval()),
    "a convolution": lambda layer: setattr(layer.ffc, "convg2g", nn.Conv2d(12, 12, 3, padding=1)),
}


@pytest.mark.parametrize("name", PARTS)
def test_layer_calls_modules_that_cannot_be_fused(name):
    ours = layer()
    PARTS[name](ours)
    torch.testing.assert_close(ours(X), by_modules(ours, X), rtol=1e-4, atol=1e-4)


TRANSFORMS = {
    "a patched convolution": lambda transform: patch(transform.conv1[0]),
    "a patched last convolution": lambda transform: patch(transform.conv2),
    "a bias": lambda transform: setattr(transform, "conv2", nn.Conv2d(6, 12, 1)),
    "a bias before the norm": lambda transform: transform.conv1.__setitem__(0, nn.Conv2d(12, 6, 1)),
    "a larger convolution": lambda transform: transform.conv1.__setitem__(0, nn.Conv2d(12, 6, 3, padding=1)),
    "another sequence": lambda transform: setattr(transform, "conv1", nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU())),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_calls_modules_that_cannot_be_fused(name):
    ours = layer()
    transform = ours.ffc.convg2g
    TRANSFORMS[name](transform)
    y = transform.conv1(X[1])
    y = transform.conv2(y + transform.fu(y))
    torch.testing.assert_close(transform(X[1]), y, rtol=1e-4, atol=1e-4)
    expected = ours.act_g(ours.bn_g(ours.ffc.convl2g(X[0]) + y))
    torch.testing.assert_close(ours(X)[1], expected, rtol=1e-4, atol=1e-4)


class Swapped(FFC):
    """A subclass with another forward."""

    def forward(self, x):
        return tuple(-part for part in super().forward(x))


def test_a_subclass_of_ffc_is_called():
    ours = layer()
    other = Swapped(16, 16, 3, 0.75, 0.75, padding=1, enable_lfu=False).eval()
    other.load_state_dict(ours.ffc.state_dict())
    x_l, x_g = ours.ffc(X)
    ours.ffc = other
    expected = ours.act_l(ours.bn_l(-x_l)), ours.act_g(ours.bn_g(-x_g))
    torch.testing.assert_close(ours(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_are_called(kind):
    ours, seen = layer(), []
    for module in (ours.ffc.convl2l, ours.ffc.convg2g.fu.conv_layer, ours.ffc.convg2g.conv2):
        getattr(module, kind)(lambda module, *_: seen.append(module) and None)
    sum(part.sum() for part in ours(tuple(part.clone().requires_grad_() for part in X))).backward()
    assert len(seen) == 3


def test_global_hooks_are_called():
    ours, seen = layer(), set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module) and None)
    try:
        out = ours(X)
    finally:
        hook.remove()
    assert seen == set(ours.modules()) - {ours.ffc.gate}
    torch.testing.assert_close(ours(X), out, rtol=1e-4, atol=1e-4)


@pytest.fixture
def small_maps(monkeypatch):
    """The rule on small maps, as users have it."""
    monkeypatch.setattr(fused, "MIN_POSITIONS", 1024)


def ops_of(layer, x):
    """The names of the ops that a layer calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    return {event.key for event in profile.key_averages()}


def results(module, x, grad):
    """The outputs of a module, and with grad the gradients of its parameters."""
    outs = module(x)
    if not grad:
        return outs
    return (*outs, *torch.autograd.grad(sum((out * out).sum() for out in outs), list(module.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trained_layers_on_small_maps_are_called(dtype, small_maps, monkeypatch):
    layer = norms(FFC_BN_ACT(16, 16, 3, 0.75, 0.75, padding=1, activation_layer=nn.ReLU, enable_lfu=False)).to(dtype)
    parts = tuple(part.to(dtype) for part in X)
    layer.eval()
    called = ops_of(layer, parts)
    assert "aten::batch_norm" in called
    assert not [name for name in called if name.startswith("inr_kernels::")]
    small = results(layer, parts, True)
    monkeypatch.setattr(fused, "MIN_POSITIONS", 0)
    assert "inr_kernels::conv3x3" in ops_of(layer, parts)
    torch.testing.assert_close(small, results(layer, parts, True), rtol=1e-3, atol=1e-4)


def test_a_constant_sequence_is_fused_on_small_maps(small_maps):
    up = FusedSequential(nn.ConvTranspose2d(4, 8, 3, 2, 1, 1), norms(nn.BatchNorm2d(8)), nn.ReLU())
    layers = nn.Sequential(*up).eval()
    expected = layers(X[0])
    assert "aten::batch_norm" in ops_of(up.eval(), X[0])
    up.requires_grad_(False)
    assert "aten::batch_norm" not in ops_of(up, X[0])
    torch.testing.assert_close(up(X[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [(8, 8, 3, 0.5, 0.5), (8, 4, 3, 0, 0.2), (8, 8, 3, 0, 0.5), (8, 8, 3, 0, 0)])
def test_absent_parts_of_small_maps(options, small_maps, monkeypatch):
    """A part that is missing, or of no channels, is skipped for any size."""
    ffc = FFC(*options, padding=1, enable_lfu=False).eval()
    x = torch.randn(1, 8 - ffc.global_in_num, 6, 7)
    small = ffc(x)
    monkeypatch.setattr(fused, "MIN_POSITIONS", 0)
    for ours, theirs in zip(small, ffc(x), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (1, 40), (0, 8)])
def test_other_maps_are_not_small(size, small_maps):
    trained = nn.Linear(1, 1)
    assert not fused.is_small(torch.empty(1, 3, *size), trained)
    assert not fused.is_small(torch.empty(2, 3, 64, 32), trained, stride=(2, 2))
    assert fused.is_small(torch.empty(1, 3, 62, 62), trained, stride=(2, 2))
    assert not fused.is_small(torch.empty(1, 3, 8, 8), trained.requires_grad_(False))
    with backend("cpu"):
        assert not fused.is_small(torch.empty(1, 3, 8, 8), nn.Linear(1, 1))


def test_errors_on_small_maps(small_maps):
    layer = FFC_BN_ACT(16, 16, 3, 0.75, 0.75, padding=1, enable_lfu=False)
    with pytest.raises(ValueError, match="x's local part must have 4 channels"):
        layer((X[1], X[1]))
    with pytest.raises(ValueError, match="x must have 5 channels"):
        FourierUnit(5, 5)(X[0])


HALF_GROUPS = {
    "stride 2": lambda: [nn.ReflectionPad2d(1), nn.Conv2d(6, 10, 3, 2), norms(nn.BatchNorm2d(10)), nn.ReLU()],
    "transposed": lambda: [nn.ConvTranspose2d(6, 10, 3, 2, 1, 1), norms(nn.BatchNorm2d(10)), nn.ReLU()],
    "1 x 1": lambda: [nn.Conv2d(6, 10, 1, bias=False), norms(nn.BatchNorm2d(10)), nn.ReLU()],
    "no norm": lambda: [nn.Conv2d(6, 10, 3, padding=1)],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HALF_GROUPS)
def test_fast_half_precision_is_fused_with_channels_last(name, dtype, fast_half):
    layers = nn.Sequential(*HALF_GROUPS[name]()).to(dtype).eval().requires_grad_(False)
    x = torch.randn(2, 6, 12, 14).to(dtype)
    ours = FusedSequential(*layers)
    assert "aten::batch_norm" not in ops_of(ours, x)
    out, eager, exact = ours(x), layers(x), layers.double()(x.double())
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out - exact).abs().max() <= 2 * (eager - exact).abs().max()


@pytest.mark.parametrize("name", HALF_GROUPS)
@pytest.mark.parametrize("speed", ["fast_half", "slow_half"])
def test_half_precision_follows_changes_of_weights(name, speed, request):
    """Also where the weight itself has channels last, and after calls in training, which have no norm to fold."""
    request.getfixturevalue(speed)
    ours = FusedSequential(*HALF_GROUPS[name]()).bfloat16().requires_grad_(False)
    x = torch.randn(2, 6, 12, 14).bfloat16()
    for change in (nn.Module.train, nn.Module.eval):
        for _ in range(2):
            change(ours)(x)
    conv = next(layer for layer in ours if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours.to(memory_format=memory_format)
        for _ in range(2):
            conv.weight.data *= -1
            torch.testing.assert_close(ours(x), nn.Sequential(*ours)(x), rtol=0.05, atol=0.1)


UNLIKE = {
    "padding": lambda: nn.Conv2d(24, 8, 3, padding=1, padding_mode="zeros", bias=False),
    "bias": lambda: nn.Conv2d(24, 8, 3, padding=1, padding_mode="reflect"),
    "dilation": lambda: nn.Conv2d(24, 8, 3, padding=2, dilation=2, padding_mode="reflect", bias=False),
    "kernel": lambda: nn.Conv2d(24, 8, 1, bias=False),
}


@pytest.mark.parametrize("requested", ["cpu", "reference"])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", UNLIKE)
def test_convolutions_of_unlike_forms_are_not_fused(name, trains, requested):
    layer = FFC_BN_ACT(32, 32, 3, 0.75, 0.75, padding=1, activation_layer=nn.ReLU, enable_lfu=False).eval()
    layer.ffc.convg2l = UNLIKE[name]()
    layer.requires_grad_(trains)
    x = torch.randn(1, 8, 10, 12), torch.randn(1, 24, 10, 12)
    ffc = layer.ffc
    expected = layer.bn_l(ffc.convl2l(x[0]) + ffc.convg2l(x[1])).relu()
    with backend(requested):
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_options_that_are_changed_in_place_are_honoured():
    layer = FFC_BN_ACT(32, 32, 3, 0.75, 0.75, padding=1, activation_layer=nn.ReLU, enable_lfu=False).eval()
    x = torch.randn(1, 8, 10, 12), torch.randn(1, 24, 10, 12)
    layer.requires_grad_(False)(x)
    layer.ffc.convl2l.padding_mode = "zeros"
    ffc = layer.ffc
    expected = layer.bn_l(ffc.convl2l(x[0]) + ffc.convg2l(x[1])).relu()
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-5)
