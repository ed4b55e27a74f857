"""LaMa's blocks and generator: state-dict keys, checkpoints, numbers, inpainting."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from op_backends import backends_of
from safetensors.torch import save_file
from torch import nn

import inr_kernels
from inr_kernels.models import LaMa, LaMaConfig
from inr_kernels.models.lama.ffc import (
    FFC,
    FFC_BN_ACT,
    ConcatTupleLayer,
    FFCResnetBlock,
    FourierUnit,
    SpectralTransform,
)

TINY = LaMaConfig(features=8, blocks=2)
RATIOS = {"ratio_gin": 0.75, "ratio_gout": 0.75, "enable_lfu": False}


def random_norms(module):
    """The module with random batch norms."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
    return module


def close(ours, theirs):
    return (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.fixture
def published(golden):
    arrays = golden("lama_generator")
    return arrays, {name[6:]: value for name, value in arrays.items() if name.startswith("state.")}


@pytest.mark.parametrize("backend", backends_of("fourier_unit"))
def test_equals_lamas_generator(published, backend):
    arrays, state = published
    model = LaMa(TINY)
    model.load_state_dict(state)
    with inr_kernels.backend(backend), torch.no_grad():
        assert close(model.eval().model(arrays["x"]), arrays["out"])


def test_published_sizes():
    for blocks, parameters in ((9, 27_048_835), (18, 50_975_875)):
        with torch.device("meta"):
            model = LaMa(LaMaConfig(blocks=blocks))
        assert sum(p.numel() for p in model.parameters()) == parameters
    keys = model.state_dict().keys()
    assert {"model.1.ffc.convl2l.weight", "model.4.ffc.convl2g.weight", "model.4.bn_g.running_var"} <= keys
    assert {"model.5.conv1.ffc.convg2g.conv1.1.weight", "model.22.conv2.ffc.convg2g.fu.conv_layer.weight"} <= keys
    assert {"model.24.bias", "model.34.weight"} <= keys


class Callback:
    """An object that Lightning pickles beside the weights, of a class that the reader does not have."""

    def __init__(self):
        self.monitor = "val_ssim"


@pytest.fixture
def lightning(published, tmp_path):
    """A checkpoint with LaMa's prefix, a discriminator, and objects of a module that cannot be imported."""
    module = types.ModuleType("gone_callbacks")
    Callback.__module__, module.Callback, sys.modules["gone_callbacks"] = "gone_callbacks", Callback, module
    state = {f"generator.{name}": value for name, value in published[1].items()} | {"discriminator.x": torch.ones(2)}
    torch.save(
        {"state_dict": state, "callbacks": {Callback: {"best": Callback()}}, "epoch": 39}, tmp_path / "best.ckpt"
    )
    del sys.modules["gone_callbacks"]
    return tmp_path / "best.ckpt"


def test_reads_lightning_checkpoints(published, lightning):
    model = LaMa.from_checkpoint(lightning)
    assert model.config == TINY and not model.training
    assert all(
        torch.equal(value, published[1][name]) for name, value in model.state_dict().items() if "batches" not in name
    )


def test_saves_and_reads_safetensors(published, tmp_path):
    save_file(published[1], tmp_path / "bare.safetensors")
    model = LaMa.from_checkpoint(str(tmp_path / "bare.safetensors"))
    assert model.config == TINY
    tanh = LaMa(LaMaConfig(features=8, blocks=1, downsamplings=2, ratio=0.5, activation="tanh"))
    tanh.save(tmp_path / "own.safetensors")
    loaded = LaMa.from_checkpoint(tmp_path / "own.safetensors")
    assert loaded.config == tanh.config
    assert all(map(torch.equal, loaded.state_dict().values(), tanh.state_dict().values()))


@pytest.mark.parametrize(
    "changes", [{"ratio": 0.3}, {"max_features": 32}, {"enable_lfu": True}, {"inputs": 5}], ids=str
)
def test_config_follows_from_the_shapes(changes, tmp_path):
    config = LaMaConfig(**{"features": 16, "blocks": 1} | changes)
    torch.save(LaMa(config).state_dict(), tmp_path / "lama.pth")
    loaded = LaMa.from_checkpoint(tmp_path / "lama.pth")
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in LaMa(config).parameters()]


@pytest.mark.parametrize("content", [{"state_dict": {"model.0": torch.ones(1)}}, {"a": 1}, [1], b"no zip"], ids=str)
def test_errors_name_the_file(content, tmp_path):
    path = tmp_path / "lama.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"lama\.ckpt is not a LaMa checkpoint"):
        LaMa.from_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        LaMa.from_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("size", [(9, 9), (43, 59), (40, 41), (57, 61)], ids=str)
def test_inpaints_any_size_and_keeps_known_pixels(size):
    model, image = random_norms(LaMa(TINY)).eval(), torch.rand(2, 3, *size)
    masks = torch.zeros(2, 1, *size), torch.ones(2, 1, *size), (torch.rand(2, 1, *size) > 0.5).float()
    with torch.no_grad():
        for mask in masks:
            out = model.inpaint(image, mask)
            assert out.shape == image.shape and out.isfinite().all()
            assert torch.equal(out[(mask == 0).expand_as(out)], image[(mask == 0).expand_as(out)])
    assert not torch.equal(out, image)


def test_values_under_the_mask_are_ignored():
    """NaNs too; values of the mask outside [0, 1] are clamped; the result has no gradient."""
    model, image, mask = random_norms(LaMa(TINY)).eval(), torch.rand(1, 3, 16, 20), torch.zeros(1, 1, 16, 20)
    mask[..., 4:9, 6:15] = 1
    expected = model.inpaint(image, mask)
    assert not expected.requires_grad and torch.equal(model.inpaint(image, 7 * mask - 1), expected)
    assert torch.equal(model.inpaint(image.masked_fill(mask == 1, torch.nan), mask), expected)


def test_errors():
    model, image, mask = LaMa(TINY).eval(), torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    bad = {
        r"image must have shape \[B, 3, H, W\] with sides of at least 9; got \[1, 3, 8, 16\]": (image[:, :, :8], mask),
        r"image must have shape \[B, 3, H, W\]": (image[:, :2], mask),
        r"mask must have shape .* = \[1, 1, 16, 16\] or .*; got \[1, 1, 16, 15\]": (image, mask[..., 1:]),
    }
    for text, arguments in bad.items():
        with pytest.raises(ValueError, match=text):
            model.inpaint(*arguments)
    for size in ((15, 16), (32, 32)):
        with pytest.raises(
            ValueError, match=r"size must be the image's \(16, 16\), the only one that this LaMa renders"
        ):
            model.inpaint(image, mask, size)
    with pytest.raises(ValueError, match=r"size must be that of the encoded image, at most \(16, 16\); got \(8, 16\)"):
        model.decode(model.encode(image, mask), (8, 16))
    assert model.inpaint(image[:0], mask[:0]).shape == (0, 3, 16, 16)


def test_splits_at_any_layer():
    """By default before the first FFC block, where the features are (local, global)."""
    model, image, mask = random_norms(LaMa(TINY)).eval(), torch.rand(2, 3, 21, 30), torch.rand(2, 21, 30) < 0.3
    expected = model.model(torch.cat((image * ~mask[:, None], mask[:, None].float()), 1))[..., :21, :30]
    assert isinstance(model.model[model.split], FFCResnetBlock)
    for split in (0, 1, model.split, model.split + 2, len(model.model)):
        model.split = split
        features = model.encode(image, mask)
        torch.testing.assert_close(model.decode(features, (21, 30)), expected, rtol=0, atol=0)
    model.split = LaMa(TINY).split
    local, across = (z.detach().requires_grad_() for z in model.encode(image, mask))
    model.decode((local, across), (21, 30)).sum().backward()
    assert local.grad.any() and across.grad.any() and [local.shape[1], across.shape[1]] == [16, 48]


def test_a_single_tensor_is_deprecated():
    model, x = LaMa(TINY).eval(), torch.rand(1, 4, 16, 16)
    with torch.no_grad():
        expected = model.model(x)
        with pytest.warns(DeprecationWarning, match=r"LaMa\(x\) is deprecated") as warned:
            assert torch.equal(model(x), expected)
            model.forward(x)
        with pytest.warns(DeprecationWarning, match=r"graphed\(\[B, 4, H, W\]\) is deprecated") as also:
            fast = model.graphed(x.shape)
        assert torch.equal(fast(x), expected)
    assert {warning.filename for warning in (*warned, *also)} == {__file__}  # the caller's


def lamas(layer, x):
    """The layer by LaMa's sums, module by module."""
    ffc, (x_l, x_g) = layer.ffc, x
    spectral = ffc.convg2g
    y = spectral.conv1(x_g)
    y = spectral.conv2(y + spectral.fu(y))
    out_l, out_g = ffc.convl2l(x_l) + ffc.convg2l(x_g), ffc.convl2g(x_l) + y
    return layer.act_l(layer.bn_l(out_l)), layer.act_g(layer.bn_g(out_g))


OPTIONS = {
    "LaMa's": {},
    "zeros": {"padding_type": "zeros"},
    "biases": {"bias": True},
    "stride 2": {"stride": 2},
    "dilated": {"dilation": 2, "padding": 2},
    "circular": {"padding_type": "circular"},
    "one activation more": {"activation_layer": nn.LeakyReLU},
    "no activation": {"activation_layer": nn.Identity},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_folded_layer_is_the_layer(name, training):
    options = {"padding": 1, "activation_layer": nn.ReLU} | RATIOS | OPTIONS[name]
    layer = random_norms(FFC_BN_ACT(16, 16, 3, **options)).double().train(training)
    x = torch.randn(2, 4, 10, 12).double(), torch.randn(2, 12, 10, 12).double()
    if name == "stride 2":
        reference = FFC_BN_ACT(16, 16, 3, **options).double().train(training)
        reference.load_state_dict(layer.state_dict())
        reference.ffc.convl2l.register_forward_hook(lambda *_: None)  # a module with a hook is called
        expected = reference(x)
    else:
        expected = lamas(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layer(dtype):
    layer = random_norms(FFC_BN_ACT(16, 16, 3, padding=1, activation_layer=nn.ReLU, **RATIOS)).eval()
    x = torch.randn(2, 4, 10, 12), torch.randn(2, 12, 10, 12)
    exact = layer(x)
    for half in (layer.to(dtype), None):
        with torch.autocast("cpu", dtype=dtype, enabled=half is None):
            out = layer(tuple(part.to(dtype) for part in x)) if half else layer.float()(x)
        for ours, theirs in zip(out, exact, strict=True):
            assert ours.dtype == dtype
            assert (ours - theirs).norm() <= 8 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_half_precision_layer_of_small_variances(dtype, bias):
    """A batch norm's scale of up to 30 is not rounded before it is folded: errors are at most twice eager's."""
    options, largest = {"padding": 1, "activation_layer": nn.ReLU, "bias": bias} | RATIOS, []
    for _ in range(6):
        layer = random_norms(FFC_BN_ACT(16, 16, 3, **options)).eval()
        for norm in layer.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_var.uniform_(1e-3, 1e-2)
        x = torch.randn(2, 4, 20, 24).to(dtype), torch.randn(2, 12, 20, 24).to(dtype)
        layer.to(dtype)
        runs = layer(x), lamas(layer, x)
        exact = lamas(layer.double(), tuple(part.double() for part in x))
        errors = [[out - truth for out, truth in zip(run, exact, strict=True)] for run in runs]
        assert all(ours.norm() <= 2 * eager.norm() for ours, eager in zip(*errors, strict=True))
        scales = [truth.abs().max() for truth in exact]
        largest.append([[e.abs().max() / scale for e, scale in zip(run, scales, strict=True)] for run in errors])
    ours, eager = torch.tensor(largest).amax(0)
    assert (ours <= 2 * eager).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_of_the_folded_layer(backend):
    layer = random_norms(FFC_BN_ACT(16, 16, 3, padding=1, activation_layer=nn.ReLU, **RATIOS)).double().eval()
    leaves = [torch.randn(2, 4, 6, 7).double().requires_grad_(), torch.randn(2, 12, 6, 7).double().requires_grad_()]
    runs = []
    with inr_kernels.backend(backend):
        for out in (layer(tuple(leaves)), lamas(layer, leaves)):
            weights = [p for p in layer.parameters() if p.requires_grad]
            runs.append(torch.autograd.grad(sum(part.square().sum() for part in out), [*leaves, *weights]))
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_tuples():
    image = torch.randn(1, 8, 8, 8)
    local = FFC_BN_ACT(8, 8, 3, 0, 0, padding=1)
    assert local(image)[1] == 0 and local((image, 0))[1] == 0 and local((image, torch.tensor(0)))[1] == 0
    split = FFC_BN_ACT(8, 8, 3, 0, 0.75, padding=1)
    assert [part.shape[1] for part in split(image)] == [2, 6]
    merged = FFC_BN_ACT(8, 8, 3, 1, 0, padding=1)((0, image))
    assert merged[0].shape == image.shape and merged[1] == 0
    whole = FFC(8, 8, 3, 1, 1, padding=1, enable_lfu=False)((0, image))
    assert whole[0] == 0 and whole[1].shape == image.shape
    assert torch.equal(ConcatTupleLayer()((image, 0)), image)
    assert ConcatTupleLayer()((image, image)).shape == (1, 16, 8, 8)
    block = random_norms(FFCResnetBlock(8, "reflect", nn.BatchNorm2d, **RATIOS)).eval()
    inline = FFCResnetBlock(8, "reflect", nn.BatchNorm2d, inline=True, **RATIOS).eval()
    inline.load_state_dict(block.state_dict())
    torch.testing.assert_close(inline(image), torch.cat(block((image[:, :2], image[:, 2:])), 1))


def test_gates_and_local_units_have_lamas_keys():
    gated = FFC(16, 16, 3, 0.5, 0.5, padding=1, gated=True)
    assert gated.state_dict()["gate.weight"].shape == (2, 16, 1, 1)
    assert "convg2g.lfu.conv_layer.weight" in gated.state_dict()
    out = gated((torch.randn(1, 8, 6, 6), torch.randn(1, 8, 6, 6)))
    assert [part.shape for part in out] == [(1, 8, 6, 6)] * 2
    with pytest.raises(ValueError, match=r"must be equal and even for enable_lfu; got \[6, 8\]"):
        gated((torch.randn(1, 8, 6, 8), torch.randn(1, 8, 6, 8)))


def test_local_fourier_unit():
    transform = random_norms(SpectralTransform(8, 8, enable_lfu=True)).eval()
    x = torch.randn(1, 8, 6, 6)
    y = transform.conv1(x)
    quarters = torch.cat([y[:, :1, i : i + 3, j : j + 3] for j in (0, 3) for i in (0, 3)], 1)
    expected = transform.conv2(y + transform.fu(y) + transform.lfu(quarters).tile(1, 1, 2, 2))
    torch.testing.assert_close(transform(x), expected)


def test_scaled_unit():
    unit = random_norms(FourierUnit(3, 4, spatial_scale_factor=0.5)).eval()
    plain = FourierUnit(3, 4).eval()
    plain.load_state_dict(unit.state_dict())
    x = torch.randn(1, 3, 8, 9)
    small = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    expected = F.interpolate(plain(small), size=(8, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(unit(x), expected)


def test_layer_errors():
    with pytest.raises(ValueError, match=r"spectral_pos_encoding, use_se and ffc3d must be off; got .*'use_se': True"):
        FourierUnit(4, 4, use_se=True)
    with pytest.raises(ValueError, match="stride must be 1 or 2; got 3"):
        FFC(8, 8, 3, 0, 0, stride=3)
    with pytest.raises(ValueError, match="spatial_transform_kwargs must be None"):
        FFCResnetBlock(8, "reflect", nn.BatchNorm2d, spatial_transform_kwargs={"pad_coef": 0.5}, **RATIOS)
    layer = FFC_BN_ACT(8, 8, 3, padding=1, **RATIOS).eval()
    with pytest.raises(ValueError, match="x must have sides of at least 2 with padding='reflect'"):
        layer((torch.zeros(1, 2, 1, 4), torch.zeros(1, 6, 1, 4)))
    with pytest.raises(ValueError, match=r"x must have 3 channels; got \[1, 1, 4, 4\]"):
        layer.ffc.convg2g.fu(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(1, 8, 4, 4), r"x's local part must have 2 channels; got \[1, 8, 4, 4\]"),
        (
            (torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 4, 4)),
            r"x's global part must have 6 channels; got \[1, 5, 4, 4\]",
        ),
        (
            (torch.zeros(1, 2, 4, 4), torch.zeros(1, 6, 4, 5)),
            r"global part must have the local part's batch 1 and size",
        ),
        (
            torch.zeros(1, 2, 4, 4).double(),
            r"x's local part must have the layer's dtype torch.float32; got torch.float64",
        ),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_errors_name_the_part(x, text, training):
    with pytest.raises(ValueError, match=text):
        FFC_BN_ACT(8, 8, 3, padding=1, **RATIOS).train(training)(x)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles(dynamic):
    block = random_norms(FFCResnetBlock(8, "reflect", nn.BatchNorm2d, **RATIOS)).eval()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for size in ((6, 7), (9, 8)):
            x = torch.randn(1, 2, *size), torch.randn(1, 6, *size)
            for ours, theirs in zip(compiled(x), block(x), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
