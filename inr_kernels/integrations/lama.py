"""LaMa's fast Fourier convolutions in other projects: advimman/lama and its copies.

A layer is recognised by its attributes and must agree with ours on random weights and features: outputs, gradients and
running statistics. FourierUnit, SpectralTransform, FFC and FFC_BN_ACT then get our forward. Modules that contain them,
such as FFCResnetBlock, keep their class.
"""

import copy
import functools
import itertools

import torch
from torch import nn

from inr_kernels._core.hooks import is_untouched
from inr_kernels.fourier_unit import FFC, FFC_BN_ACT, FourierUnit, SpectralTransform

from . import class_swap, probe
from .class_swap import AcceleratedModule, Adapter, Match, Unsupported, register

# Our class -> the attributes of its upstream counterpart.
KINDS = {
    FFC_BN_ACT: ("ffc", "bn_l", "bn_g", "act_l", "act_g"),
    FFC: ("convl2l", "convl2g", "convg2l", "convg2g", "gate", "gated", "ratio_gout", "global_in_num"),
    SpectralTransform: ("downsample", "conv1", "fu", "conv2", "enable_lfu", "stride"),
    FourierUnit: (
        *("conv_layer", "bn", "relu", "groups", "fft_norm"),
        *("spatial_scale_factor", "spatial_scale_mode", "spectral_pos_encoding", "ffc3d"),
    ),
}
SIZE = 8, 8  # of the feature map that a layer is compared on; local Fourier units need it even and square


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has the attributes of one of LaMa's layers and is not ours."""
    return not isinstance(module, tuple(KINDS)) and _kind(module) is not None


def verify(module: nn.Module) -> Match:
    """The match of one layer; Unsupported if it is not LaMa's. Accelerates the layers inside it first."""
    for part in module.children():  # our forward reads the weights of accelerated layers without calling them
        if is_candidate(part) and not isinstance(part, AcceleratedModule):
            class_swap.replace(part, verify)
    if reason := _why_not(module):
        raise Unsupported(reason)
    key = type(module).forward, _description(module)
    if key not in _REASONS:
        _REASONS[key] = _why_different(module)
    if _REASONS[key]:
        raise Unsupported(_REASONS[key])
    return class_swap.match(module, _LAYERS[_kind(module)], "forward")


_REASONS: dict[tuple, str] = {}  # results of _why_different by description: a network has few different layers


def is_kind(module: nn.Module, ours: type[nn.Module]) -> bool:
    """Whether the module has the attributes of LaMa's counterpart of our class, or is accelerated as such."""
    return _kind(module) is ours


def _kind(module):
    return next((ours for ours, names in KINDS.items() if all(hasattr(module, name) for name in names)), None)


def _why_not(module):
    """Why the structure is not LaMa's, "" if it is. Cheap: runs at every call."""
    if "forward" in vars(module):
        return "forward is patched on the object"
    if _kind(module) is not FourierUnit:
        return ""
    conv, norm, parts = module.conv_layer, module.bn, (module.conv_layer, module.bn, module.relu)
    if [type(part) for part in parts] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
        return "its layers are not Conv2d, BatchNorm2d and ReLU"
    if conv.kernel_size != (1, 1) or conv.bias is not None or not norm.affine:
        return "its convolution is not 1 x 1 without bias, or its norm has no weights"
    if module.spectral_pos_encoding or module.ffc3d or getattr(module, "use_se", False):
        return "it encodes positions, transforms the channels too or uses squeeze-and-excitation"
    if not is_untouched(*parts):
        return "a layer of it, or all modules, have a hook, or a forward is patched"
    return ""


def _description(module):
    """Everything except the weights: layers with equal descriptions are compared once."""
    attributes = [
        (type(part), name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, (bool, int, float, str, tuple)) and name[0] != "_" and name != "training"
    ]
    return f"{module!r} {attributes}"


def _why_different(module):
    """Why a layer's forward differs from ours on random numbers, "" if it does not. Does not change the module."""
    ours, generator = _kind(module), torch.Generator().manual_seed(0)
    with probe.sandbox():
        layer = copy.deepcopy(module).float().cpu().requires_grad_()
        with torch.no_grad():
            for name, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
                if tensor.is_floating_point():
                    fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
                    tensor.normal_(0, fan_in**-0.5, generator=generator)
                    tensor.abs_().add_(0.5) if name.endswith("running_var") else None
        for training in (False, True):
            runs, before = [], copy.deepcopy(layer.state_dict())
            for forward in (type(layer).forward, ours.forward):
                layer.load_state_dict(before)
                layer.train(training)
                runs.append(_run(layer, forward))
            for theirs, our in zip(*runs, strict=True):
                if theirs.shape != our.shape or not torch.allclose(theirs.float(), our.float(), rtol=1e-3, atol=1e-4):
                    return f"its results differ on random inputs in {'training' if training else 'evaluation'}"
    return ""


def _run(layer, forward):
    """Outputs, gradients and buffers."""
    random = functools.partial(
        torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu"
    )
    ffc = getattr(layer, "ffc", layer)
    if _kind(layer) is FourierUnit:
        channels = (layer.conv_layer.in_channels // 2,)
    elif _kind(layer) is SpectralTransform:
        channels = (layer.conv1[0].in_channels,)
    else:
        local = [conv.in_channels for conv in (ffc.convl2l, ffc.convl2g) if isinstance(conv, nn.Conv2d)]
        channels = (local or [0])[0], ffc.global_in_num
    parts = [random(2, n, *SIZE).requires_grad_() if n else 0 for n in channels]
    out = forward(layer, parts[0] if len(parts) == 1 else tuple(parts))
    out = [
        part for part in (out if isinstance(out, tuple) else (out,)) if isinstance(part, torch.Tensor) and part.dim()
    ]
    loss = sum((part * random(*part.shape)).sum() for part in out)
    leaves = [leaf for leaf in (*parts, *layer.parameters()) if isinstance(leaf, torch.Tensor)]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*(part.detach() for part in out), *grads, *(buffer.clone() for buffer in layer.buffers())]


class _Layer(AcceleratedModule):
    """One of LaMa's layers with the forward of `_inr_kind`, our class of the same name."""

    def forward(self, x):
        if class_swap.falls_back(self, _why_not_this_call(self)):
            return super().forward(x)
        return self._inr_kind.forward(self, x)


_LAYERS = {kind: type("_Layer", (_Layer,), {"_inr_kind": kind}) for kind in KINDS}


def _why_not_this_call(module):
    """Why the original must run: the layer, or one inside it that our forward does not call, has changed."""
    ffc = getattr(module, "ffc", module)
    spectral = getattr(ffc, "convg2g", module)
    unit = getattr(spectral, "fu", module)
    for part in (module, ffc, spectral, unit):
        if isinstance(part, AcceleratedModule) and (reason := class_swap.why_changed(part)):
            return reason
    return _why_not(module) or (_why_not(unit) if isinstance(unit, AcceleratedModule) else "")


ADAPTER = register(
    Adapter("LaMa's Fourier convolution", is_candidate, verify, {kind.__name__: names for kind, names in KINDS.items()})
)
