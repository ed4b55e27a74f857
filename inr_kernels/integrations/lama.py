"""LaMa's fast Fourier convolutions in other projects: advimman/lama and its copies.

A layer is known by its attributes, and must on random weights and features agree with ours: outputs, gradients and
running statistics. Then the object's class becomes a subclass of its own with our forward: FourierUnit, FFC and
FFC_BN_ACT. What contains them, FFCResnetBlock say, stays what it is.
"""

import contextlib
import copy
import functools
import itertools

import torch
from torch import nn

from inr_kernels.fourier_unit import FFC, FFC_BN_ACT, FourierUnit

# Ours -> what a foreign layer of the kind has.
KINDS = {
    FFC_BN_ACT: ("ffc", "bn_l", "bn_g", "act_l", "act_g"),
    FFC: ("convl2l", "convl2g", "convg2l", "convg2g", "gate", "gated", "ratio_gout", "global_in_num"),
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
    restore(module)
    try:
        if reason := _why_not(module) or _differs_once(type(module).forward, _description(module), _Held(module)):
            return reason
    except Exception as error:  # whatever foreign code raises
        return f"trying it raised {type(error).__name__}: {error}".splitlines()[0]
    _become(module, _subclass(type(module)))
    return ""


def restore(module):
    """Gives a module its own class back, if it has one of ours."""
    if isinstance(module, _Accelerated):
        _become(module, module._inr_original)


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
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "a layer of it has a hook"
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


class _Held:
    """A module that is no part of what it is remembered by."""

    def __init__(self, module):
        self.module = module

    def __eq__(self, other):
        return isinstance(other, _Held)

    def __hash__(self):
        return 0


@functools.lru_cache(maxsize=64)
def _differs_once(forward, description, held):
    return _differs(held.module)


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


class _Accelerated(nn.Module):
    """The first base of a replaced class."""

    def __init_subclass__(cls, **_):
        """The foreign classes' own, a registry's perhaps, shall not see ours."""

    def forward(self, x):
        return super().forward(x) if _why_not(self) else _kind(self).forward(self, x)

    def __reduce_ex__(self, protocol):
        make, args, *rest = super().__reduce_ex__(protocol)
        return _remake, (make, tuple(self._inr_original if arg is type(self) else arg for arg in args)), *rest

    def __setstate__(self, state):
        """A copy, or what was pickled, is tried anew: there, the class may be another one."""
        _become(self, self._inr_original)
        self.__setstate__(state)
        replace(self)


def _become(module, cls):
    object.__setattr__(module, "__class__", cls)


def _remake(make, args):
    """Pickles name it: it must keep its name and place."""
    module = make(*args)
    _become(module, _subclass(type(module)))  # until __setstate__
    return module


@functools.cache
def _subclass(original):
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original)(original.__name__, (_Accelerated, original), names | {"_inr_original": original})
