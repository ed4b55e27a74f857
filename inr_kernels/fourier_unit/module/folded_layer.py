"""An FFC layer with constant weights: norms folded into them, for inference and for the gradient of the input."""

from typing import Any

import torch
from torch import nn

from inr_kernels._core import dispatch, signs

from .. import op
from ..arguments import compute_dtype
from ..functional import conv3x3
from ..op import spectral_pipeline
from .ffc import FFC, is_plain
from .folding import affine, computes, folded, folds, is_pointwise, scaled
from .spectral import FourierUnit, SpectralTransform

Pair = tuple[torch.Tensor, torch.Tensor]


def is_supported(layer: Any) -> bool:
    """Whether `FoldedLayer` computes what an `FFC_BN_ACT.forward` computes for this layer."""
    if not computes(layer.ffc, FFC):
        return False
    ffc: Any = layer.ffc
    spectral, convs = ffc.convg2g, (ffc.convl2l, ffc.convg2l, ffc.convl2g)
    if not all(type(conv) is nn.Conv2d for conv in convs) or not is_plain(ffc):
        return False
    geometry = {(c.kernel_size, c.stride, c.dilation, c.padding) for c in convs}
    paddings = {c.padding_mode for c in convs}
    norms = folds(layer.bn_l, layer.act_l) and folds(layer.bn_g, layer.act_g)
    relus = type(layer.act_l) is nn.ReLU is type(layer.act_g)
    plain = geometry == {((3, 3), (1, 1), (1, 1), (1, 1))} and paddings in ({"reflect"}, {"zeros"})
    return plain and norms and relus and _is_supported_spectral(spectral)


def _is_supported_spectral(spectral: Any) -> bool:
    if not computes(spectral, SpectralTransform) or spectral.enable_lfu or spectral.stride != 1:
        return False
    unit = spectral.fu
    first = list(spectral.conv1) if computes(spectral.conv1, nn.Sequential) else []
    if [type(layer) for layer in first] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
        return False
    if not computes(unit, FourierUnit) or unit.spatial_scale_factor is not None:
        return False
    pointwise = all(map(is_pointwise, (first[0], unit.conv_layer, spectral.conv2)))
    return pointwise and folds(*first[1:]) and type(unit.bn) is nn.BatchNorm2d and folds(unit.bn, nn.ReLU())


class FoldedLayer(nn.Module):
    """An `FFC_BN_ACT` in evaluation with its norms folded into its weights; no gradients reach the weights.

    Args:
        layer: one that `is_supported`.
        bits: whether autograd keeps one bit per activation for the backward, or the activations, which is faster.
    """

    local_weight: torch.Tensor
    across_weight: torch.Tensor
    first_weight: torch.Tensor
    last_weight: torch.Tensor
    unit_weight: torch.Tensor
    local_bias: torch.Tensor | None
    across_bias: torch.Tensor | None
    first_bias: torch.Tensor | None
    unit_bias: torch.Tensor | None

    def __init__(self, layer: Any, bits: bool = False):
        super().__init__()
        ffc, spectral = layer.ffc, layer.ffc.convg2g
        first, unit, last = spectral.conv1, spectral.fu, spectral.conv2
        both = torch.cat((ffc.convl2l.weight, ffc.convg2l.weight), 1)
        bias = None if ffc.convl2l.bias is None else ffc.convl2l.bias + ffc.convg2l.bias
        scale_g = affine(layer.bn_g)
        weights = {
            "local": folded(both, bias, affine(layer.bn_l)),
            "across": folded(ffc.convl2g.weight, ffc.convl2g.bias, scale_g),
            "first": folded(first[0].weight, None, affine(first[1])),
            "last": (last.weight if scale_g is None else scaled(last.weight, scale_g[0]), None),
        }
        weight = unit.conv_layer.weight
        weight, shift = folded(weight.to(compute_dtype(weight.dtype)), None, affine(unit.bn))
        weights["unit"] = weight.flatten(1), shift
        for name, (weight, bias) in weights.items():
            self.register_buffer(f"{name}_weight", weight.detach())
            self.register_buffer(f"{name}_bias", None if bias is None else bias.detach())
        self.padding, self.norm = ffc.convl2l.padding_mode, unit.fft_norm
        self.groups, self.unit_groups, self.last_groups = first[0].groups, unit.groups, last.groups
        self.bits = bits

    def forward(self, x: Pair) -> Pair:
        """(local, global) -> (local, global)."""
        return _InputGradient.apply(self, *x)


class _InputGradient(torch.autograd.Function):
    """Computes a `FoldedLayer`; differentiable once, by its input."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x_l: torch.Tensor, x_g: torch.Tensor) -> Pair:
        requested = dispatch.requested_backend(None)
        steps, backend = op.steps(x_g, requested), requested or None
        y = _multiply(_matrices(layer.first_weight, layer.groups), x_g).add_(layer.first_bias.view(-1, 1, 1)).relu_()
        weight, shift = layer.unit_weight, layer.unit_bias
        z, spectrum = spectral_pipeline.forward_positive(steps, y, weight, shift, layer.unit_groups, layer.norm)
        across = _multiply(_matrices(layer.last_weight, layer.last_groups), z.add_(y))
        options = {"relu": True, "padding": layer.padding, "backend": backend}
        out_l = conv3x3(x_l, layer.local_weight, layer.local_bias, other=x_g, **options)
        out_g = conv3x3(x_l, layer.across_weight, layer.across_bias, add=across, **options)
        if any(ctx.needs_input_grad):
            kept = (signs.pack(t) if layer.bits else t for t in (y, out_l, out_g))
            ctx.save_for_backward(spectrum, *kept)
            ctx.layer, ctx.requested, ctx.dtypes = layer, requested, (x_l.dtype, x_g.dtype)
        return out_l, out_g

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_l: torch.Tensor, g_g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer = ctx.layer
        spectrum, y, out_l, out_g = ctx.saved_tensors
        select = signs.select if layer.bits else _where_positive
        steps, requested = op.steps(g_g, ctx.requested), ctx.requested
        g_l, g_g = select(g_l, out_l), select(g_g, out_g)
        d_y = _multiply(_matrices(layer.last_weight, layer.last_groups).mT.to(g_g.dtype), g_g)
        weight, groups = layer.unit_weight, layer.unit_groups
        d_y += spectral_pipeline.input_gradient(steps, d_y, spectrum, weight, groups, layer.norm)
        d_g = _multiply(_matrices(layer.first_weight, layer.groups).mT.to(d_y.dtype), select(d_y, y))
        local, across = layer.local_weight.to(g_l.dtype), layer.across_weight.to(g_l.dtype)
        channels = across.shape[1]
        from_both = torch.cat((local[:, :channels], across))
        d_l = op.input_gradient(g_l, from_both, layer.padding, requested, g_g)
        d_g += op.input_gradient(g_l, local[:, channels:], layer.padding, requested)
        return None, d_l.to(ctx.dtypes[0]), d_g.to(ctx.dtypes[1])


def _where_positive(grad, output):
    """The gradient of a ReLU's input."""
    return torch.ops.aten.threshold_backward(grad, output, 0)


def _matrices(weight, groups):
    """The weight [O, C / groups, 1, 1] of a 1 x 1 convolution as [groups, O / groups, C / groups]."""
    return weight.flatten(1).unflatten(0, (groups, -1))


def _multiply(matrices, x):
    """The 1 x 1 convolution, [B, C, H, W] -> [B, O, H, W], as a matrix product: faster than F.conv2d on two threads."""
    product = matrices @ x.reshape(len(x), len(matrices), -1, x.shape[2] * x.shape[3])
    return product.view(len(x), -1, *x.shape[2:])
