"""LIIF's decoder in other projects: yinboc/liif and its many copies, and mmagic's port.

`why_not` reads the structure, `probe.differs` compares the numbers, and `replace` swaps the object's class for a
subclass of it that overrides `query_rgb`. Every call asks `why_not` again: hooks, layers and flags may change.
"""

import functools
import inspect
import logging
import weakref
from typing import NamedTuple

import torch
from torch import nn

from inr_kernels.local_implicit.functional import Form, decode_queries, feature_columns
from inr_kernels.local_implicit.module import HoistCache

from . import probe

LOG = logging.getLogger("inr_kernels")
FLAGS = ("local_ensemble", "feat_unfold", "cell_decode")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# float64 stays with the original, as our coordinates are float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_decoder(module):
    """Whether it deserves a word in the log: it has a method query_rgb."""
    return callable(getattr(type(module), "query_rgb", None))


def replace(module):
    """Accelerates one decoder, in place. Returns why it was left alone, "" if it was not."""
    restore(module)
    _warn_once.cache_clear()
    try:
        if reason := _why_not_new(module):
            return reason
        _become(module, _subclass(type(module), _MIXINS[_signature(type(module))], _verified(module)))
    except Exception as error:  # whatever foreign code raises
        return f"trying it raised {type(error).__name__}: {error}".splitlines()[0]
    return ""


def restore(module):
    """Gives a module its own class back, if it has one of ours."""
    if isinstance(module, _Accelerated):
        _become(module, module._inr_original)
        _CACHES.pop(module, None)


def why_not(module):
    """Why the structure is not LIIF's, "" if it is. Cheap."""
    if missing := [flag for flag in FLAGS if not hasattr(module, flag)]:
        return f"no LIIF, it has no {missing[0]}"
    imnet = getattr(module, "imnet", None)
    layers = getattr(imnet, "layers", None)
    if type(layers) is not nn.Sequential:
        return "it has no imnet" if imnet is None else "imnet.layers is no nn.Sequential"
    parts = list(layers)
    if len(parts) < 3 or [type(part) for part in parts] != [nn.Linear, nn.ReLU] * (len(parts) // 2) + [nn.Linear]:
        return f"imnet.layers is not Linear, ReLU, ..., Linear but {', '.join(type(part).__name__ for part in parts)}"
    if any("forward" in vars(part) or any(getattr(part, hooks) for hooks in HOOKS) for part in (imnet, layers, *parts)):
        return "imnet or a layer of it has a hook or a patched forward"
    weights, biases = _linears(module)
    if any(bias is None for bias in biases):
        return "a layer of imnet has no bias"
    first, *others = params = [*weights, *biases]
    if any(p.dtype != first.dtype or p.device != first.device for p in others):
        return "the layers of imnet differ in dtype or device"
    if not first.is_floating_point():
        return f"imnet has weights in {first.dtype}"
    # Quantised and distributed weights hide in subclasses; the compiler has some of its own.
    if not torch.compiler.is_compiling() and any(type(p) not in (torch.Tensor, nn.Parameter) for p in params):
        return "imnet has weights that are no plain tensors"
    return ""


def _why_not_new(module):
    """All that can speak against replacing a module."""
    if (signature := _signature(type(module))) not in _MIXINS:
        return "query_rgb takes neither (coord, cell) nor (feature, coord, cell)"
    if "query_rgb" in vars(module):
        return "query_rgb is patched on the object"
    if reason := why_not(module):
        return reason
    per_channel = feature_columns(1, _form(module))
    channels, rest = divmod(module.imnet.layers[0].in_features - _columns(module, 0), per_channel)
    if channels < 1 or rest:
        return "imnet's inputs are not features, offset and cell"
    return probe.differs(module, channels, "feature" in signature, _decode_by_reference)


def _linears(module):
    linears = list(module.imnet.layers)[::2]
    return [linear.weight for linear in linears], [linear.bias for linear in linears]


def _form(module):
    return Form(bool(module.feat_unfold), bool(module.local_ensemble))


def _columns(module, channels):
    """How many inputs the MLP has for that many channels."""
    return feature_columns(channels, _form(module)) + (4 if module.cell_decode else 2)


def _signature(original):
    parameters = list(inspect.signature(original.query_rgb).parameters.values())[1:]
    plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return tuple(parameter.name for parameter in parameters) if plain else None


class _Verified(NamedTuple):
    """What the probe saw, and what must still hold at every call."""

    query_rgb: object
    imnet: type
    imnet_forward: object
    switches: tuple
    imnet_switches: tuple


def _verified(module):
    """Any plain switch may change a decoding, not LIIF's flags alone."""
    flags, imnet = {flag: getattr(module, flag) for flag in FLAGS}, module.imnet
    switches = tuple((flags | _switches(module)).items()), tuple(_switches(imnet).items())
    return _Verified(type(module).query_rgb, type(imnet), type(imnet).forward, *switches)


def _switches(module):
    """`training` is none: the probe ran in both modes. Nor is mmagic's `eval_bsize`: it only cuts calls."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, str, int, float)) and name[0] != "_" and name not in ("training", "eval_bsize")
    }


def _decode(module, feat, coord, cell):
    """LIIF's output, or None if the original has to compute it."""
    cell = cell if module.cell_decode else None
    if reason := _why_not_this_call(module, feat, coord, cell):
        if not torch.compiler.is_compiling():
            _warn_once(module._inr_original, reason)
        return None
    weights, biases = _linears(module)
    hoist = None
    if not torch.compiler.is_compiling():
        hoist = _CACHES.setdefault(module, HoistCache()).keyed(feat, weights[0], biases[0])
    cell = None if cell is None else cell.float()
    out = decode_queries(feat, coord.float(), cell, weights, biases, _form(module), hoist=hoist)
    return out if out.dtype == coord.dtype else out.float()  # LIIF's ensemble weights are in coord's dtype


def _decode_by_reference(module, feat, coord, cell):
    cell = cell if module.cell_decode else None
    return decode_queries(feat, coord, cell, *_linears(module), _form(module), backend="reference")


def _why_not_this_call(module, feat, coord, cell):
    verified = module._inr_verified
    if module._inr_original.query_rgb is not verified.query_rgb:
        return "its query_rgb has changed"
    if reason := why_not(module):
        return reason
    if type(module.imnet) is not verified.imnet or verified.imnet.forward is not verified.imnet_forward:
        return "its imnet has another class or forward"
    if nn.modules.module._has_any_global_hook():
        return "there is a hook on all modules"
    for owner, switches in ((module, verified.switches), (module.imnet, verified.imnet_switches)):
        if any(getattr(owner, name, None) != value for name, value in switches):
            return "a flag has changed; accelerate(model) takes it up"
    weight = module.imnet.layers[0].weight
    tensors = [feat, coord] if cell is None and not module.cell_decode else [feat, coord, cell]
    fits = (
        all(isinstance(t, torch.Tensor) and t.dtype in DTYPES and t.device == weight.device for t in tensors)
        and (feat.dtype == weight.dtype or (torch.is_autocast_enabled(feat.device.type) and weight.dtype in DTYPES))
        and feat.device.type in ("cpu", "cuda")
        and (feat.dim(), coord.dim(), coord.shape[-1], len(coord)) == (4, 3, 2, len(feat))
        and (cell is None or cell.shape == coord.shape)
        and _columns(module, feat.shape[1]) == weight.shape[1]
        and min(feat.shape[1:]) > 0
    )
    return "" if fits else "the arguments of a call fit neither each other nor LIIF in float32 or half precision"


@functools.cache
def _warn_once(original, reason):
    LOG.warning("%s decodes some calls as before: %s", original.__qualname__, reason)


_CACHES = weakref.WeakKeyDictionary()  # beside the modules, so that no pickle, copy or state_dict holds one


class _Accelerated(nn.Module):
    """The first base of a replaced class; query_rgb is in its subclasses."""

    def __init_subclass__(cls, **_):
        """The foreign classes' own, a registry's perhaps, shall not see ours."""

    def __reduce_ex__(self, protocol):
        make, args, *rest = super().__reduce_ex__(protocol)
        args = tuple(self._inr_original if arg is type(self) else arg for arg in args)
        return _remake, (make, args), *rest

    def __setstate__(self, state):
        """A copy, or what was pickled, is verified anew: there, the class may be another one."""
        _become(self, self._inr_original)
        self.__setstate__(state)
        if reason := replace(self):
            LOG.warning("%s left alone: %s", type(self).__qualname__, reason)


class _FeatureKept(_Accelerated):
    def query_rgb(self, coord, cell=None):
        """The features are self.feat, as in yinboc/liif."""
        out = _decode(self, getattr(self, "feat", None), coord, cell)
        return super().query_rgb(coord, cell) if out is None else out


class _FeatureGiven(_Accelerated):
    def query_rgb(self, feature, coord, cell=None):
        """The features are an argument, as in mmagic."""
        out = _decode(self, feature, coord, cell)
        return super().query_rgb(feature, coord, cell) if out is None else out


_MIXINS = {("coord", "cell"): _FeatureKept, ("feature", "coord", "cell"): _FeatureGiven}


def _become(module, cls):
    object.__setattr__(module, "__class__", cls)


def _remake(make, args):
    """Pickles name it: it must keep its name and place."""
    module = make(*args)
    _become(module, _subclass(type(module), _Accelerated, None))  # until __setstate__
    return module


@functools.cache
def _subclass(original, mixin, verified):
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    ours = {"_inr_original": original, "_inr_verified": verified}
    return type(original)(original.__name__, (mixin, original), names | ours)
