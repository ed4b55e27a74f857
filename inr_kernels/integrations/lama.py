"""LaMa's fast Fourier convolutions in other projects: advimman/lama and its copies.

A layer is known by its attributes, and must on random weights and features agree with ours: outputs, gradients and
running statistics. Then the object's class becomes a subclass of its own with our forward: FourierUnit,
SpectralTransform, FFC and FFC_BN_ACT. What contains them, FFCResnetBlock say, stays what it is.
"""

import contextlib
import copy
import itertools

import torch
from torch import nn

from inr_kernels._core.hooks import is_untouched
from inr_kernels.fourier_unit import FFC, FFC_BN_ACT, FourierUnit, SpectralTransform

from . import class_swap

# Ours -> what a foreign layer of the kind has.
KINDS = {
    FFC_BN_ACT: ("ffc", "bn_l", "bn_g", "act_l", "act_g"),
    FFC: ("convl2l", "convl2g", "convg2l", "convg2g", "gate", "gated", "ratio_gout", "global_in_num"),
    SpectralTransform: ("downsample", "conv1", "fu", "conv2", "enable_lfu", "stride"),
    FourierUnit: (
        *("conv_layer", "bn", "relu", "groups", "fft_norm"),
        *("spatial_scale_factor", "spatial_scale_mode", "spectral_pos_encoding", "ffc3d"),
    ),
}
WHAT = "LaMa's Fourier convolution"
SIZE = 8, 8  # of the map that a layer is tried on: even and square, as local Fourier units ask


def is_candidate(module):
    """Whether it deserves a word in the log: a layer of LaMa that is not ours."""
    return not isinstance(module, tuple(KINDS)) and _kind(module) is not None


def replace(module):
    """Accelerates one layer, in place. Returns why it was left alone, "" if it was not."""
    return class_swap.attempt(module, _verify)


def _verify(module):
    for part in module.children():  # first: only of those is known that they need not be called
        if is_candidate(part) and not isinstance(part, class_swap.Accelerated):
            replace(part)
    if reason := _why_not(module):
        raise class_swap.LeftAlone(reason)
    key = type(module).forward, _description(module)
    if key not in _REASONS:
        _REASONS[key] = _differs(module)
    if _REASONS[key]:
        raise class_swap.LeftAlone(_REASONS[key])
    return _LAYERS[_kind(module)], class_swap.verdict(module, "forward")


_REASONS = {}  # what was found for a description: a network has few kinds of layers


def _kind(module):
    return next((ours for ours, names in KINDS.items() if all(hasattr(module, name) for name in names)), None)


def _why_not(module):
    """Why the structure is not LaMa's, "" if it is. Cheap: every call asks."""
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
        return "it encodes positions, transforms channels or squeezes"
    if not is_untouched(*parts):
        return "there is a hook on a layer of it or on all modules, or a patched forward"
    return ""


def _description(module):
    """All but the weights. Layers that are described alike are tried once."""
    switches = [
        (type(part), name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, (bool, int, float, str, tuple)) and name[0] != "_" and name != "training"
    ]
    return f"{module!r} {switches}"


def _differs(module):
    """Why a layer's forward is not ours, "" if on random numbers it is. The module stays as it is."""
    ours, generator = _kind(module), torch.Generator().manual_seed(0)
    with _plain():
        shell = copy.deepcopy(module).float().cpu().requires_grad_()
        with torch.no_grad():
            for name, tensor in itertools.chain(shell.named_parameters(), shell.named_buffers()):
                if tensor.is_floating_point():
                    fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
                    tensor.normal_(0, fan_in**-0.5, generator=generator)
                    tensor.abs_().add_(0.5) if name.endswith("running_var") else None
        for training in (False, True):
            runs, before = [], copy.deepcopy(shell.state_dict())
            for forward in (type(shell).forward, ours.forward):
                shell.load_state_dict(before)
                shell.train(training)
                runs.append(_run(shell, forward))
            for theirs, our in zip(*runs, strict=True):
                if theirs.shape != our.shape or not torch.allclose(theirs.float(), our.float(), rtol=1e-3, atol=1e-4):
                    return f"it computes something else {'in training' if training else 'in evaluation'}"
    return ""


def _run(shell, forward):
    """Outputs, gradients and buffers."""
    generator = torch.Generator().manual_seed(1)
    ffc = getattr(shell, "ffc", shell)
    if _kind(shell) is FourierUnit:
        channels = (shell.conv_layer.in_channels // 2,)
    elif _kind(shell) is SpectralTransform:
        channels = (shell.conv1[0].in_channels,)
    else:
        local = [conv.in_channels for conv in (ffc.convl2l, ffc.convl2g) if isinstance(conv, nn.Conv2d)]
        channels = (local or [0])[0], ffc.global_in_num
    parts = [torch.randn(2, n, *SIZE, generator=generator).requires_grad_() if n else 0 for n in channels]
    out = forward(shell, parts[0] if len(parts) == 1 else tuple(parts))
    out = [
        part for part in (out if isinstance(out, tuple) else (out,)) if isinstance(part, torch.Tensor) and part.dim()
    ]
    loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in out)
    leaves = [leaf for leaf in (*parts, *shell.parameters()) if isinstance(leaf, torch.Tensor)]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*(part.detach() for part in out), *grads, *(buffer.clone() for buffer in shell.buffers())]


@contextlib.contextmanager
def _plain():
    """Gradients, no autocast, and the random generator as before."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):  # noqa: SIM117
        with torch.random.fork_rng(devices=[]):
            yield


class _Layer(class_swap.Accelerated):
    """One of LaMa's layers with the forward of `_inr_kind`, its counterpart here."""

    _inr_replace = staticmethod(replace)

    def forward(self, x):
        if reason := _why_not_this_call(self):
            class_swap.as_before(self, reason)
            return super().forward(x)
        return self._inr_kind.forward(self, x)


_LAYERS = {kind: type("_Layer", (_Layer,), {"_inr_kind": kind}) for kind in KINDS}


def _why_not_this_call(module):
    """Why the original has to compute, "" if it has not: it or a layer that we would not call has changed."""
    ffc = getattr(module, "ffc", module)
    for part in (module, ffc, getattr(ffc, "convg2g", module)):
        if isinstance(part, class_swap.Accelerated) and (reason := class_swap.why_changed(part)):
            return reason
    return _why_not(module)
