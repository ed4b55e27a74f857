"""The implicit pyramid against its formula, torch's interpolation, and layers one by one."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from inr_kernels.models import ImplicitPyramidDecoder, ImplicitUpsample


def stirred(module):
    """The module in float64, with random biases instead of a new one's zeros."""
    for name, parameter in module.double().named_parameters():
        if name.endswith("bias"):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return module


def literal(layer, feat, y, x, size):
    """`ImplicitUpsample` at one pixel of the output, from the formula, feat [C, h, w]."""
    linears = list(layer.layers)[::2]
    cell = torch.tensor([n / m for n, m in zip(feat.shape[1:], size, strict=True)], dtype=feat.dtype) * layer.cell_scale
    at = [(i + 0.5) * n / m - 0.5 for i, n, m in zip((y, x), feat.shape[1:], size, strict=True)]
    low = [int(i // 1) for i in at]
    total = 0

    def run(values, layers):
        for linear in layers[:-1]:
            values = linear(values).relu()
        return layers[-1](values)

    for dy, dx in itertools.product((0, 1), repeat=2):
        row, col = (min(max(i + d, 0), n - 1) for i, d, n in zip(low, (dy, dx), feat.shape[1:], strict=True))
        offset = torch.tensor([2 * (at[0] - row), 2 * (at[1] - col)], dtype=feat.dtype)
        area = abs(at[0] - low[0] - (1 - dy)) * abs(at[1] - low[1] - (1 - dx))
        value = feat[:, row, col]
        if layer.mode == "split":
            value = linears[0](torch.cat((value, offset))).relu()
        elif layer.mode == "liif":
            value = run(torch.cat((value, offset, cell)), linears)
        total = total + area * value
    if layer.mode == "liif":
        return total
    return run(torch.cat((total, cell)), linears[1:] if layer.mode == "split" else linears)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("mode", ["split", "bilinear", "liif"])
def test_upsample_is_its_formula(mode, eager):
    layer = stirred(ImplicitUpsample(5, 4, hidden=(12, 9), mode=mode, cell_scale=1.5, eager=eager))
    feat, size = torch.randn(1, 5, 6, 7, dtype=torch.double), (11, 14)
    out = layer(feat, size)[0]
    for y, x in [(1, 1), (4, 7), (9, 12), (5, 2)]:  # inner pixels: at the border neighbours are clamped
        torch.testing.assert_close(out[:, y, x], literal(layer, feat[0], y, x, size), rtol=0, atol=1e-6)


def test_bilinear_is_linear():
    """With the identity as its MLP, it is torch's own interpolation."""
    layer = ImplicitUpsample(3, 3, hidden=(6,), mode="bilinear").double()
    eye = torch.eye(3, dtype=torch.double)
    with torch.no_grad():
        layer.layers[0].weight.copy_(torch.cat((torch.cat((eye, -eye)), torch.zeros(6, 2)), 1))
        layer.layers[2].weight.copy_(torch.cat((eye, -eye), 1))
    feat = torch.randn(2, 3, 5, 6, dtype=torch.double)
    expected = F.interpolate(feat, (10, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(layer(feat, (10, 12)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 5)])
def test_head_and_last_layer_are_one_matrix(size):
    decoder = stirred(ImplicitPyramidDecoder((5, 4), hidden=(8, 8)))
    feat = torch.randn(2, 5, 4, 3, dtype=torch.double)
    out = decoder(feat, [size])
    expected = decoder.head(decoder.layers[0](feat, size))
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    inputs = [*decoder.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ["split", "bilinear", "liif"])
def test_a_new_pyramid_keeps_the_maps_contrast(mode):
    """Otherwise training would start from one colour for every map."""
    decoder = ImplicitPyramidDecoder((64, 32, 16, 16), hidden=(64, 64, 64), mode=mode)
    feat, sizes = torch.randn(4, 64, 8, 8), [(16, 16), (32, 32), (64, 64)]
    for layer, size in zip(decoder.layers, sizes, strict=True):
        feat = layer(feat, size)
        assert 0.1 < feat.std((2, 3)).mean() < 3


def test_wrong_number_of_sizes():
    decoder = ImplicitPyramidDecoder((5, 4, 4), hidden=(8, 8))
    with pytest.raises(ValueError, match="sizes must have one size per layer, 2 in all"):
        decoder(torch.randn(1, 5, 4, 3), [(8, 6)])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 4), {"mode": "nearest"}, "mode must be one of split, bilinear, liif; got 'nearest'"),
        ((4, 4), {"hidden": ()}, r"hidden a sequence of them that is not empty; got 4, \(\), 4"),
        ((0, 4), {}, "in_channels, hidden and out_channels must be positive integers"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ImplicitUpsample(*arguments, **options)


def test_feature_errors():
    with pytest.raises(ValueError, match="feat must have 4 dimensions"):
        ImplicitUpsample(4, 4)(torch.randn(4, 5, 5), (9, 9))
    with pytest.raises(ValueError, match=r"feat must have 4 channels; got \[1, 5, 5, 5\]"):
        ImplicitUpsample(4, 4)(torch.randn(1, 5, 5, 5), (9, 9))
