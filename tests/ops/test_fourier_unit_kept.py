"""What is kept of constant weights between calls: the same results, noticed changes, and nothing that outlives them."""

import copy
import functools
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from inr_kernels._core import native
from inr_kernels.fourier_unit import FFC_BN_ACT, FFCResnetBlock, FusedSequential
from inr_kernels.fourier_unit.functional import conv3x3
from inr_kernels.fourier_unit.op import kept


def block():
    torch.manual_seed(0)
    model = FFCResnetBlock(32, "reflect", nn.BatchNorm2d, ratio_gin=0.75, ratio_gout=0.75, enable_lfu=False)
    return model.eval().requires_grad_(False), (torch.randn(1, 8, 12, 14), torch.randn(1, 24, 12, 14))


def up():
    torch.manual_seed(0)
    layers = [nn.ConvTranspose2d(16, 12, 3, 2, 1, 1), nn.BatchNorm2d(12), nn.ReLU()]
    return FusedSequential(*layers).eval().requires_grad_(False), torch.randn(1, 16, 24, 36)


def weight_of(model):
    return model.conv2.ffc.convl2l.weight if isinstance(model, FFCResnetBlock) else model[0].weight


def kept_layer(layer):
    """What is kept of a layer for inference, or None."""
    entry = vars(layer).get("_inr_kept")
    return entry and entry.made[2]


def flat(out):
    return torch.cat([part.flatten() for part in (out if isinstance(out, tuple) else (out,))])


CHANGES = {
    "in place": lambda w: w.mul_(1.5),
    "through .data": lambda w: w.data.mul_(1.5),
    "one value through numpy": lambda w: np.multiply(w.detach().numpy()[:1, :1], 1.5, out=w.detach().numpy()[:1, :1]),
    "other signs": lambda w: w.neg_(),
    "twice": lambda w: w.mul_(2),
    "two signs": lambda w: w.flatten()[:65:64].neg_(),
    "other .data": lambda w: setattr(w, "data", w.data.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [block, up])
def test_a_changed_weight_is_noticed(make, change):
    (model, x), (other, _) = make(), make()
    before = flat(model(x))
    assert torch.equal(flat(model(x)), before)
    CHANGES[change](weight_of(model))
    weight_of(other).copy_(weight_of(model))
    assert torch.equal(flat(model(x)), flat(other(x)))
    assert not torch.equal(flat(model(x)), before)


@pytest.mark.parametrize("distance", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("bit", [0, 22, 23, 30, 31])
def test_two_changed_bits_change_the_fingerprint(bit, distance):
    """A vector's lanes are added up separately; a bit that changes twice in a lane must not cancel."""
    data = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    flip = torch.tensor(-(2**31) if bit == 31 else 2**bit, dtype=torch.int32)

    def fingerprint():
        return native.load()[0].fingerprint(tensors=[(data.data_ptr(), len(data))], threads=1)

    seen = {fingerprint()}
    for first in range(0, 2048, 32):
        data[[first, first + distance]] ^= flip
        seen.add(fingerprint())
    assert len(seen) == 65


def test_a_changed_norm_is_noticed():
    (model, x), (other, _) = block(), block()
    model(x)
    for each in (model, other):
        each.conv1.bn_l.running_var.data.mul_(2)
    assert torch.equal(flat(model(x)), flat(other(x)))


def made_of(model):
    """What is kept of the model's weight, by name."""
    made = {name: value[1] for name, value in kept._KEPT.get(weight_of(model), {}).items()}
    if isinstance(model, FFCResnetBlock) and (layer := kept_layer(model.conv2)):
        made["inference"] = layer
    return made


def double_eps(layer):
    layer.ffc.convg2g.fu.bn.eps *= 1000


def pad_with_zeros(layer):
    layer.ffc.convl2l.padding_mode = layer.ffc.convg2l.padding_mode = layer.ffc.convl2g.padding_mode = "zeros"


def add_a_bias(layer):
    layer.ffc.convg2g.conv2.bias = nn.Parameter(torch.ones(len(layer.ffc.convg2g.conv2.weight)))


CHANGES_OF_STRUCTURE = {
    "an option": double_eps,
    "padding": pad_with_zeros,
    "an additional parameter": add_a_bias,
    "training": lambda layer: layer.bn_l.train(),
    "another layer": lambda layer: setattr(layer, "act_g", nn.Identity()),
    "a hook": lambda layer: layer.ffc.convl2g.register_forward_hook(lambda *args: 2 * args[2]),
    "a forward": lambda layer: setattr(layer.ffc, "forward", lambda x: x),
    "a forward of a layer without weights": lambda layer: setattr(
        layer.ffc.convg2g.downsample, "forward", lambda x: 2 * x
    ),
    "another class": lambda layer: setattr(layer.act_g, "__class__", nn.Identity),
    "a hook of a layer without weights": lambda layer: layer.ffc.convg2g.downsample.register_forward_hook(
        lambda *args: 2 * args[2]
    ),
    "a hook of the layer": lambda layer: layer.register_forward_hook(lambda *args: [2 * part for part in args[2]]),
}


@pytest.mark.parametrize("name", CHANGES_OF_STRUCTURE)
def test_a_changed_structure_is_noticed(name):
    (model, x), (other, _) = block(), block()
    with torch.no_grad():
        before = flat(model(x))
        assert kept_layer(model.conv2) and torch.equal(flat(model(x)), before)
        for changed in (model, other):
            CHANGES_OF_STRUCTURE[name](changed.conv2)
        assert torch.equal(flat(model(x)), flat(other(x)))
        assert not torch.allclose(flat(model(x)), before, rtol=1e-3)


def test_attributes_that_are_no_options_are_ignored():
    model, x = block()
    with torch.no_grad():
        before = flat(model(x))
        model.conv2.ffc.note, model.conv2.bn_l.owner = torch.randn(3), [model]
        model(x)
        first = kept_layer(model.conv2)
        model.conv2.ffc.note = torch.randn(3)
        assert torch.equal(flat(model(x)), before) and kept_layer(model.conv2) is first
    alive = weakref.ref(first)
    del model, first
    gc.collect()
    assert alive() is None


UNFIT = {
    "unit in float64": lambda layer: layer.ffc.convg2g.fu.double(),
    "1 x 1 in bfloat16": lambda layer: layer.ffc.convg2g.conv2.bfloat16(),
    "3 x 3 in float64": lambda layer: layer.ffc.convl2l.double(),
    "kernel of another size": lambda layer: setattr(layer.ffc.convl2l, "weight", nn.Parameter(torch.randn(8, 8, 1, 1))),
    "fewer hidden channels": lambda layer: setattr(layer.ffc.convg2g, "conv2", nn.Conv2d(6, 24, 1, bias=False)),
}


@pytest.mark.parametrize("name", UNFIT)
def test_weights_that_do_not_fit_reach_no_kernel(name):
    (model, x), (other, _) = block(), block()
    for changed in (model, other):
        UNFIT[name](changed.conv2)
    outcomes = []
    for run in (model, functools.partial(inference_by_ops, other)):
        try:
            with torch.no_grad():
                outcomes.append(flat(run(x)))
        except (ValueError, RuntimeError) as error:
            outcomes.append(str(error))
    assert type(outcomes[0]) is type(outcomes[1])
    if isinstance(outcomes[0], torch.Tensor):
        torch.testing.assert_close(*outcomes)


def inference_by_ops(model, x):
    with FlopCounterMode(display=False):  # a dispatch mode
        return model(x)


def test_another_forward_before_the_first_call():
    (model, x), (other, _) = block(), block()
    for changed in (model, other):
        changed.conv2.ffc.convg2g.downsample.forward = lambda x: 2 * x
    with torch.no_grad():
        torch.testing.assert_close(flat(model(x)), flat(inference_by_ops(other, x)))
        assert not kept_layer(model.conv2)


def test_memory_that_moves():
    """What is kept must not read the layer's own tensors, whose storage may change with the values unchanged."""
    torch.manual_seed(0)
    options = {"ratio_gin": 0.75, "ratio_gout": 0.75, "enable_lfu": False, "bias": True}
    model = FFCResnetBlock(32, "reflect", lambda channels: nn.Identity(), **options).eval().requires_grad_(False)
    _, x = block()
    with torch.no_grad():
        before, first = flat(model(x)), kept_layer(model.conv2)
        model.share_memory()
        filler = [torch.full((n,), 1e9) for n in range(1, 65)]
        assert torch.equal(flat(model(x)), before) and kept_layer(model.conv2) is first
        del filler


def test_a_residual_without_global_part():
    model = FFCResnetBlock(32, "reflect", nn.BatchNorm2d, ratio_gin=0.5, ratio_gout=0.5, enable_lfu=False)
    model.conv1 = FFC_BN_ACT(16, 32, 3, 0, 0.5, padding=1, enable_lfu=False)
    model.eval().requires_grad_(False)
    x = torch.randn(1, 16, 12, 14)
    expected = flat(model(x.clone().requires_grad_()))
    with torch.no_grad():
        torch.testing.assert_close(flat(model(x)), expected, rtol=1e-4, atol=1e-4)


def test_threads_share_a_layer():
    model, x = block()
    with torch.no_grad():
        expected = flat(model(x))

    def run(_):
        with torch.no_grad():
            return torch.equal(flat(model(x)), expected)

    for _ in range(5):
        vars(model.conv2).pop("_inr_kept", None)
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(run, range(24)))


def test_training_and_other_devices_free_what_is_kept():
    model, x = block()
    with torch.no_grad():
        model(x)
        assert kept_layer(model.conv2)
    model.requires_grad_()(x)
    assert not kept_layer(model.conv2)


def test_kept_layers_compute_what_ops_do():
    model, x = block()
    model(tuple(part.clone().requires_grad_() for part in x))
    model.requires_grad_()
    expected = flat(model(x))
    assert not (kept_layer(model.conv1) or kept_layer(model.conv2))
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(flat(model(x)), expected, rtol=1e-5, atol=1e-5)
        assert kept_layer(model.conv1) and kept_layer(model.conv2)
        assert kept_layer(copy.deepcopy(model).conv2) is kept_layer(pickle.loads(pickle.dumps(model)).conv2) is None
        with FlopCounterMode(display=False) as counter:  # sees torch's convolutions
            model(x)
        assert counter.get_total_flops() > 0
        for wrong in ((x[0], x[1][..., 1:]), (x[0][:, 1:], x[1]), (x[0].double(), x[1]), (x[0], x[1][:0])):
            with pytest.raises((ValueError, TypeError)):
                model.conv2(wrong)
        with pytest.raises(ValueError, match="sides of at least 2"):
            model.conv2(tuple(part[..., :1] for part in x))


@pytest.mark.parametrize(("make", "name"), [(block, "inference"), (up, "conv2d, True")])
def test_weights_are_transformed_once(make, name):
    model, x = make()
    model(x)
    first = made_of(model)
    model(x)
    assert any(key.startswith(name) for key in first)
    assert all(made_of(model)[key] is value for key, value in first.items())


def test_a_kept_weight_has_no_part_in_a_transposed_padding():
    weight, x = kept.keep(torch.randn(5, 17, 3, 3)), torch.randn(1, 17, 6, 8)
    conv3x3(x, weight)
    for padding in ("reflect transposed", "zeros"):
        expected = conv3x3(x, weight.clone(), padding=padding, backend="reference")
        torch.testing.assert_close(conv3x3(x, weight, padding=padding), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [block, up])
def test_nothing_outlives_the_weights(make):
    model, x = make()
    model(x)
    alive = [weakref.ref(tensor) for tensor in made_of(model).values()]
    model = copy.deepcopy(model)
    gc.collect()
    assert alive and not any(ref() is not None for ref in alive)
    assert made_of(model) == {}


@pytest.mark.parametrize("make", [block, up])
def test_nothing_is_kept_of_weights_in_training(make):
    model, x = make()
    model.requires_grad_()
    flat(model(x)).sum().backward()
    assert made_of(model) == {}
    with torch.no_grad():
        model(x)
    assert made_of(model)


def test_gradients_of_the_input_after_inference_mode():
    model, x = block()
    with torch.inference_mode():
        expected = flat(model(x)).clone()
    leaves = [part.clone().requires_grad_() for part in x]
    out = flat(model(tuple(leaves)))
    torch.testing.assert_close(out.detach(), expected)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_what_a_hook_has_seen_is_not_changed():
    model, x = block()
    seen = []
    model.conv2.act_g.register_forward_hook(lambda module, inputs, out: seen.append((out, out.clone())))
    with torch.no_grad():
        model(x)
    assert torch.equal(*seen[0])


def test_autocast_keeps_the_dtype_of_the_sum():
    model, x = block()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert {part.dtype for part in model(x)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_the_library_nothing_is_kept(dtype, monkeypatch):
    weight = torch.randn(8, 4, 1, 1, dtype=dtype)
    assert kept.can_keep(weight)
    monkeypatch.setattr(native, "load", lambda: (None, "not built"))
    assert not kept.can_keep(weight)
    layers = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()).to(dtype).eval()
    x = torch.randn(2, 4, 12, 14).to(dtype)
    out = FusedSequential(*layers.requires_grad_(False))(x)
    torch.testing.assert_close(out, layers(x))
