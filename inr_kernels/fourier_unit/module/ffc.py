"""The fast Fourier convolution FFC."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core.checks import require, require_input, shape
from inr_kernels._core.hooks import is_untouched

from ..functional import conv2d, conv3x3
from ..op import kept
from .folding import computes, folded_bias
from .fused import folded_weight, is_constant, is_small, prefers_conv2d
from .spectral import SpectralTransform, spectral

Part = torch.Tensor | int  # [B, C, H, W]; 0 where a part has no channels
Parts = tuple[Part, Part]  # local, global


class FFC(nn.Module):
    """Applies a fast Fourier convolution to (local, global) or to one tensor, the local part.

        local'  = convl2l(local) + convg2l(global)
        global' = convl2g(local) + convg2g(global)            convg2g: a SpectralTransform

    Args:
        in_channels, out_channels: channels of both parts together; int(channels * ratio) of them are global.
        kernel_size, stride, padding, dilation, groups, bias, padding_type: options of the three convolutions.
        ratio_gin, ratio_gout: shares of the global part. A part without channels is absent.
        enable_lfu, spectral_kwargs: options of `SpectralTransform`.
        gated: whether a sigmoid gate, computed from all channels, multiplies convg2l and convl2g.

    Example:
        >>> ffc = FFC(8, 8, 3, 0.5, 0.75, padding=1, enable_lfu=False)
        >>> [part.shape for part in ffc((torch.randn(1, 4, 5, 7), torch.randn(1, 4, 5, 7)))]
        [torch.Size([1, 2, 5, 7]), torch.Size([1, 6, 5, 7])]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        ratio_gin: float,
        ratio_gout: float,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        enable_lfu: bool = True,
        padding_type: str = "reflect",
        gated: bool = False,
        **spectral_kwargs: Any,
    ):
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2; got {stride}")
        in_g, out_g = int(in_channels * ratio_gin), int(out_channels * ratio_gout)
        in_l, out_l = in_channels - in_g, out_channels - out_g
        self.stride, self.gated, self.global_in_num = stride, gated, in_g
        self.ratio_gin, self.ratio_gout = ratio_gin, ratio_gout

        def conv(inputs, outputs):
            options = {"dilation": dilation, "groups": groups, "bias": bias, "padding_mode": padding_type}
            absent = inputs == 0 or outputs == 0
            return nn.Identity() if absent else nn.Conv2d(inputs, outputs, kernel_size, stride, padding, **options)

        self.convl2l, self.convl2g, self.convg2l = conv(in_l, out_l), conv(in_l, out_g), conv(in_g, out_l)
        self.convg2g: nn.Module = nn.Identity()
        if in_g and out_g:
            spectral_groups = 1 if groups == 1 else groups // 2
            self.convg2g = SpectralTransform(in_g, out_g, stride, spectral_groups, enable_lfu, **spectral_kwargs)
        self.gate = nn.Conv2d(in_channels, 2, 1) if gated and in_g and out_l else nn.Identity()

    def forward(self, x: torch.Tensor | Parts) -> Parts:
        """(local, global) or local -> (local, global)."""
        return convolve(self, x)


def as_parts(x: Any) -> Any:
    """(local, global); an absent part, in LaMa an integer or a scalar, is 0."""
    parts = x if isinstance(x, tuple) else (x, 0)
    return tuple(part if is_present(part) else 0 for part in parts)


def is_present(part: Any) -> bool:
    """Whether the part is a map, not the 0 of an absent one."""
    return isinstance(part, torch.Tensor) and part.dim() > 0


def is_plain(ffc: Any) -> bool:
    """Whether each sum of convolutions can be computed as one convolution of both parts' channels."""
    convs = [conv for conv in (ffc.convl2l, ffc.convg2l, ffc.convl2g) if type(conv) is not nn.Identity]
    plain = all(type(conv) is nn.Conv2d and conv.groups == 1 for conv in convs) and not ffc.gated
    summed = [conv for conv in (ffc.convl2l, ffc.convg2l) if type(conv) is nn.Conv2d]
    plain = plain and len({_form(conv) for conv in summed}) <= 1
    known = type(ffc.convg2g) is nn.Identity or computes(ffc.convg2g, SpectralTransform)
    return plain and known and is_untouched(ffc, ffc.convg2g, *convs)


def _form(conv):
    """What two convolutions must have in common to be computed as one."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode, conv.bias is None


def convolve(ffc: Any, x: Any, after: Sequence[tuple[Any, bool]] = ((None, False), (None, False))) -> Parts:
    """Computes both parts of an FFC; after: for each part, (scale, shift) or None, and whether a ReLU follows."""
    x_l, x_g = as_parts(x)
    if not is_plain(ffc):
        return _call_modules(ffc, x_l, x_g)
    check_parts(ffc, x_l, x_g)
    if are_small(ffc, x_l, x_g) and all(step == (None, False) for step in after):
        return _call_modules(ffc, x_l, x_g)
    (affine_l, relu_l), (affine_g, relu_g) = after
    across: Part = 0
    if type(ffc.convg2g) is not nn.Identity and is_present(x_g):
        scale, _ = affine_g or (None, None)
        across = spectral(ffc.convg2g, x_g, scale)
    return (
        _fused_convolution([(ffc.convl2l, x_l), (ffc.convg2l, x_g)], 0, affine_l, relu_l),
        _fused_convolution([(ffc.convl2g, x_l)], across, affine_g, relu_g),
    )


def are_small(ffc: Any, x_l: Any, x_g: Any) -> bool:
    """Whether the convolutions are called one by one, because of the parts' size; all that are called have a part."""
    if torch.compiler.is_compiling():  # it also makes symbols of the ratios
        return False
    outputs = ffc.ratio_gout != 1, ffc.ratio_gout != 0
    for part, convs in ((x_l, (ffc.convl2l, ffc.convl2g)), (x_g, (ffc.convg2l, ffc.convg2g))):
        needed = [is_present(part) and output for output in outputs]
        if needed != [type(conv) is not nn.Identity for conv in convs]:
            return False
    strides = [conv.stride for conv in (ffc.convl2l, ffc.convl2g, ffc.convg2l) if type(conv) is nn.Conv2d]
    return bool(strides) and is_small(x_l if is_present(x_l) else x_g, ffc, stride=strides[0])


def check_parts(ffc: Any, x_l: Any, x_g: Any) -> None:
    """Raises unless the parts fit the convolutions that read them, and each other."""
    for part, name, convs in ((x_l, "local", (ffc.convl2l, ffc.convl2g)), (x_g, "global", (ffc.convg2l,))):
        for conv in convs:
            if type(conv) is not nn.Identity and is_present(part):
                require_input(part, f"x's {name} part", conv.in_channels, conv.weight)
    if is_present(x_l) and is_present(x_g):
        batch, _, *size = x_l.shape
        fits = (x_g.shape[0], *x_g.shape[2:]) == (batch, *size)
        require(fits, "x's global part", f"have the local part's batch {batch} and size {size}", shape(x_g))


def _fused_convolution(pairs, add, affine, relu):
    """Computes relu(scale (sum of conv(x)) + shift + add) as one convolution."""
    pairs = [(conv, x) for conv, x in pairs if type(conv) is not nn.Identity and is_present(x)]
    if not pairs:
        if not is_present(add):
            return 0
        add = add if affine is None else add + affine[1].to(add.dtype).view(-1, 1, 1)
        return add.relu() if relu else add
    convs, inputs = zip(*pairs, strict=True)
    conv = convs[0]  # all have its options
    bias = None if conv.bias is None else sum(conv.bias for conv in convs)
    add = add if is_present(add) else None
    geometry, known = (conv.kernel_size, conv.stride, conv.dilation), conv.padding_mode in ("zeros", "reflect")
    if (*geometry, conv.padding) == ((3, 3), (1, 1), (1, 1), (1, 1)) and known:
        weight = folded_weight(convs, inputs[0], affine and affine[0])
        bias = folded_bias(bias, affine, conv.weight.dtype)
        other = inputs[1] if len(inputs) > 1 else None
        return conv3x3(inputs[0], weight, bias, other=other, add=add, relu=relu, padding=conv.padding_mode)
    x, padding = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1), conv.padding
    by_number = known and conv.dilation == (1, 1) and not isinstance(padding, str)
    direct = by_number and is_constant(*convs) and prefers_conv2d(x)
    options = {"stride": conv.stride, "padding": padding, "padding_mode": conv.padding_mode}
    if direct and x.dtype.itemsize > 2:  # half precision would round the scale
        weight = kept.keep(conv.weight) if len(convs) == 1 else torch.cat([conv.weight for conv in convs], 1)
        scale, shift = affine or (None, bias)
        bias = shift if affine is None or bias is None else shift + bias * scale
        return conv2d(x, weight, bias, scale=scale, add=add, relu=relu, **options)
    weight, bias = folded_weight(convs, x, affine and affine[0]), folded_bias(bias, affine, conv.weight.dtype)
    if direct:
        return conv2d(x, weight, bias, add=add, relu=relu, **options)
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    out = F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation)
    out = out if add is None else out + add
    return out.relu_() if relu else out


def _call_modules(ffc, x_l, x_g):
    """Computes both parts by calling every module, including the gate."""
    g2l = l2g = 1
    if ffc.gated:
        gates = torch.sigmoid(ffc.gate(torch.cat([part for part in (x_l, x_g) if is_present(part)], 1)))
        g2l, l2g = gates.chunk(2, 1)
    out_l = out_g = 0
    if ffc.ratio_gout != 1:
        out_l = ffc.convl2l(x_l) + ffc.convg2l(x_g) * g2l
    if ffc.ratio_gout != 0:
        out_g = ffc.convl2g(x_l) * l2g + ffc.convg2g(x_g)
    return out_l, out_g
