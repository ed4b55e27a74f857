"""The 3 x 3 convolution of LIIF's encoders and IN2: the same as torch's, with its options."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels import backend
from inr_kernels.fourier_unit import FusedSequential
from inr_kernels.fourier_unit.op import kept
from inr_kernels.models.common.convolution import Conv3x3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 40), (3, 16)])
@pytest.mark.parametrize("requested", ["cpu", "reference"])
def test_equals_torchs_convolution(inputs, outputs, dtype, requested):
    layer = Conv3x3(inputs, outputs).to(dtype)
    x = torch.randn(2, inputs, 33, 35).to(dtype).requires_grad_()
    add = torch.randn(2, outputs, 33, 35).to(dtype)
    runs = []
    for eager in (False, True):
        layer.eager = eager
        with backend(requested):
            out = layer(x, add=add, relu=True)
        runs.append([out.detach(), *torch.autograd.grad(out.float().square().mean(), [x, *layer.parameters()])])
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 1e-1}[dtype]
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_layer_that_is_trained_again_keeps_nothing():
    layer, x = Conv3x3(16, 16), torch.randn(1, 16, 9, 11)
    with torch.no_grad():
        layer(x)
        assert kept.is_kept(layer.weight)
    layer(x)
    assert not kept.is_kept(layer.weight)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_to_onnx_has_torchs_convolution():
    layer = nn.Sequential(Conv3x3(16, 16), FusedSequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))
    layer.eval().requires_grad_(False)
    program = torch.onnx.export(layer, (torch.randn(1, 16, 9, 11),), dynamo=True, verbose=False)
    assert program is not None
    assert [node.op_type for node in program.model.graph].count("Conv") == 2


def test_options_that_are_changed_in_place_are_honoured():
    layer, x = Conv3x3(16, 16), torch.randn(1, 16, 9, 11)
    layer.padding_mode = "reflect"
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer.padding_mode, layer.padding, layer.dilation = "zeros", (2, 2), (2, 2)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=2, dilation=2))
