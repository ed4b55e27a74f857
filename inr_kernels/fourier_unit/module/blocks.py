"""FFC with norm and activation (FFC_BN_ACT), and as a residual block (FFCResnetBlock)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._device import DeviceContext

from inr_kernels._core import backends, dispatch
from inr_kernels._core.checks import has_autocast
from inr_kernels._core.snapshot import Snapshot

from ..op import kept
from .ffc import FFC, Parts, are_small, as_parts, check_parts, convolve, is_plain, is_present
from .folded_layer import FoldedLayer, is_supported
from .folding import affine, computes, folds
from .fused import prefers_conv2d
from .inference import Inference


class FFC_BN_ACT(nn.Module):
    """Applies `FFC`, then a norm and an activation to each part.

    In evaluation, batch norms are folded into the convolutions, which also add the parts and apply a ReLU.

    Args:
        norm_layer: called with the number of channels. activation_layer: called with inplace=True.
        All others: options of `FFC`.

    Example:
        >>> layer = FFC_BN_ACT(8, 8, 3, 0.75, 0.75, padding=1, activation_layer=nn.ReLU, enable_lfu=False)
        >>> [part.shape for part in layer((torch.randn(1, 2, 5, 7), torch.randn(1, 6, 5, 7)))]
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
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] = nn.Identity,
        padding_type: str = "reflect",
        enable_lfu: bool = True,
        **kwargs: Any,
    ):
        super().__init__()
        args = in_channels, out_channels, kernel_size, ratio_gin, ratio_gout, stride, padding, dilation, groups, bias
        self.ffc = FFC(*args, enable_lfu=enable_lfu, padding_type=padding_type, **kwargs)
        out_g = int(out_channels * ratio_gout)
        has_l, has_g = ratio_gout != 1, ratio_gout != 0
        self.bn_l = norm_layer(out_channels - out_g) if has_l else nn.Identity()
        self.bn_g = norm_layer(out_g) if has_g else nn.Identity()
        self.act_l = activation_layer(inplace=True) if has_l else nn.Identity()
        self.act_g = activation_layer(inplace=True) if has_g else nn.Identity()

    def forward(self, x: torch.Tensor | Parts) -> Parts:
        """(local, global) or local -> (local, global)."""
        if inference := _inference(self, x):
            return inference(x)
        if _needs_input_gradient_only(self, x) and is_supported(self):
            check_parts(self.ffc, *x)
            return FoldedLayer(self)(x)
        parts = (self.bn_l, self.act_l), (self.bn_g, self.act_g)
        foldable = computes(self.ffc, FFC) and is_plain(self.ffc) and all(folds(*part) for part in parts)
        if foldable and not are_small(self.ffc, *as_parts(x)):
            return convolve(self.ffc, x, [(affine(norm), type(act) is nn.ReLU) for norm, act in parts])
        x_l, x_g = self.ffc(x)
        return self.act_l(self.bn_l(x_l)), self.act_g(self.bn_g(x_g))


class FFCResnetBlock(nn.Module):
    """Applies two `FFC_BN_ACT` and adds the input.

    Args:
        dim: channels of both parts together.
        padding_type, norm_layer, activation_layer, dilation, conv_kwargs: options of `FFC_BN_ACT`.
        spatial_transform_kwargs: must be None; LaMa's rotations of features, which none of its published models uses.
        inline: whether input and output are one tensor of both parts, local channels first.

    Example:
        >>> block = FFCResnetBlock(8, "reflect", nn.BatchNorm2d, ratio_gin=0.75, ratio_gout=0.75, enable_lfu=False)
        >>> [part.shape for part in block((torch.randn(1, 2, 5, 7), torch.randn(1, 6, 5, 7)))]
        [torch.Size([1, 2, 5, 7]), torch.Size([1, 6, 5, 7])]
    """

    def __init__(
        self,
        dim: int,
        padding_type: str,
        norm_layer: Callable[..., nn.Module],
        activation_layer: Callable[..., nn.Module] = nn.ReLU,
        dilation: int = 1,
        spatial_transform_kwargs: None = None,
        inline: bool = False,
        **conv_kwargs: Any,
    ):
        super().__init__()
        if spatial_transform_kwargs is not None:
            raise ValueError(f"spatial_transform_kwargs must be None; got {spatial_transform_kwargs}")
        conv_kwargs |= {"padding": dilation, "dilation": dilation, "padding_type": padding_type}
        conv_kwargs |= {"norm_layer": norm_layer, "activation_layer": activation_layer}
        self.conv1 = FFC_BN_ACT(dim, dim, kernel_size=3, **conv_kwargs)
        self.conv2 = FFC_BN_ACT(dim, dim, kernel_size=3, **conv_kwargs)
        self.inline = inline

    def forward(self, x: torch.Tensor | Parts) -> torch.Tensor | Parts:
        """(local, global) or local -> (local, global); inline: [B, C, H, W] -> [B, C, H, W]."""
        if self.inline:
            channels = self.conv1.ffc.global_in_num
            assert isinstance(x, torch.Tensor)
            x = x.split((x.shape[1] - channels, channels), 1)
        identity = as_parts(x)
        middle = self.conv1(identity)
        if inference := _inference(self.conv2, middle, identity):
            out = inference(middle, identity)
        else:
            out = tuple(a + b for a, b in zip(identity, self.conv2(middle), strict=True))
        return torch.cat(out, 1) if self.inline else out


def frozen(layer: nn.Module) -> nn.Module:
    """Returns a layer that computes the same as an `FFC_BN_ACT` in evaluation, for gradients of its input only.

    What autograd keeps of it for the backward are the signs before its ReLUs, one bit each. The weights are folded
    once, here: later changes of the layer's do not reach them.

    Args:
        layer: an `FFC_BN_ACT` of 3 x 3 convolutions with stride 1 and ReLUs, with local and global channels in and out,
            as in LaMa's blocks. Any other layer, one in training, with hooks or with gates, is returned itself.

    Example:
        >>> layer = FFC_BN_ACT(8, 8, 3, 0.75, 0.75, padding=1, activation_layer=nn.ReLU, enable_lfu=False).eval()
        >>> [part.shape for part in frozen(layer)((torch.randn(1, 2, 5, 7), torch.randn(1, 6, 5, 7)))]
        [torch.Size([1, 2, 5, 7]), torch.Size([1, 6, 5, 7])]
    """
    supported = isinstance(layer, FFC_BN_ACT) and computes(layer, FFC_BN_ACT) and is_supported(layer)
    return FoldedLayer(layer, bits=True) if supported else layer


class _Kept:
    """What a layer keeps for inference, as an attribute of its own; copies and pickles of the layer have none.

    It is kept in one attribute, (structure, state of the tensors, what was made of them), since threads may share it.
    """

    NAME = "_inr_kept"

    def __init__(self) -> None:
        self.made: tuple[Snapshot | None, Any, Inference | None] = None, None, None

    def __reduce__(self):
        return _Kept, ()


def _inference(layer, x, residual=None):
    """The `Inference` that computes the layer for x and the residual; None if the layer must be called.

    It is kept as long as nothing of the layer changes, and until the layer is trained or called on another device.
    """
    if torch.compiler.is_compiling() or not isinstance(x, tuple):
        return None
    maps = x if residual is None else (*x, *residual)
    if not all(map(is_present, maps)):
        return None
    if not x[0].is_cpu or (torch.is_grad_enabled() and _needs_gradient(next(layer.parameters(), x[0]))):
        vars(layer).pop(_Kept.NAME, None)
        return None
    if _needs_gradient(*maps) or any(t.is_neg() for t in maps):
        return None
    if not prefers_conv2d(x[0]):
        return None
    # Modes and the profiler must see ops.
    if torch._C._len_torch_dispatch_stack() or _has_function_mode() or torch.autograd._profiler_enabled():
        return None
    entry = vars(layer).get(_Kept.NAME) or vars(layer).setdefault(_Kept.NAME, _Kept())
    snapshot, state, inference = entry.made
    if snapshot is None or not snapshot.holds():
        if not (computes(layer, FFC_BN_ACT) and is_supported(layer)):
            return None
        snapshot, state = Snapshot(layer), None
        if not snapshot.holds():  # a layer that is not called here has hooks
            return None
    tensors = snapshot.tensors()
    if not kept.can_keep(*maps, *tensors) or _needs_gradient(*tensors):
        return None
    current = kept.state_of(tensors)
    if inference is None or state != current:
        with torch.inference_mode(False), torch.no_grad():
            inference = Inference(FoldedLayer(layer))
        entry.made = snapshot, current, inference
    return inference if inference.takes(x, residual) else None


def _has_function_mode():
    """Whether a mode other than a default device sees torch's functions."""
    if not torch._C._len_torch_function_stack():
        return False
    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _needs_input_gradient_only(layer, x):
    """Whether autograd needs gradients of (local, global), none of the weights, and C++ kernels compute them."""
    if not (torch.is_grad_enabled() and isinstance(x, tuple) and all(map(is_present, x))):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or dispatch.is_transformed(*x):
        return False
    if any(p.requires_grad for p in layer.parameters()) or dispatch.requested_backend(None) not in ("", "cpu"):
        return False
    native = all(backends.is_for_native(part) and not has_autocast(part) for part in x)
    return native and any(part.requires_grad for part in x)
