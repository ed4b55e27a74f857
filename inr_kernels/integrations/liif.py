"""LIIF's decoder in other projects: yinboc/liif and its many copies, and mmagic's port.

`why_not` reads the structure, `_differs` compares the numbers, and the object's class becomes a subclass of it that
overrides `query_rgb`. Every call asks `why_not` again: hooks, layers and flags may change.
"""

import contextlib
import copy
import weakref
from typing import NamedTuple

import torch
from torch import nn

from inr_kernels.local_implicit.functional import Form, decode_queries, feature_columns
from inr_kernels.local_implicit.module import HoistCache

from . import class_swap, probe

WHAT = "LIIF's decoding"
FLAGS = ("local_ensemble", "feat_unfold", "cell_decode")
SIZE = 5, 4  # of the features that the probe uses
# float64 stays with the original, as our coordinates are float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_candidate(module):
    """Whether it deserves a word in the log: it has a method query_rgb."""
    return callable(getattr(type(module), "query_rgb", None))


def replace(module):
    """Accelerates one decoder, in place. Returns why it was left alone, "" if it was not."""
    return class_swap.attempt(module, _verify)


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
    if class_swap.has_hooks(imnet, layers, *parts):
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


def _verify(module):
    """The mixin and what must hold later; LeftAlone if anything speaks against replacing a module."""
    signature = class_swap.signature(type(module), "query_rgb")
    names = signature and tuple(name for name, *_ in signature)
    if names not in _MIXINS:
        raise class_swap.LeftAlone("query_rgb takes neither (coord, cell) nor (feature, coord, cell)")
    if "query_rgb" in vars(module):
        raise class_swap.LeftAlone("query_rgb is patched on the object")
    if reason := why_not(module):
        raise class_swap.LeftAlone(reason)
    per_channel = feature_columns(1, _form(module))
    channels, rest = divmod(module.imnet.layers[0].in_features - _columns(module, 0), per_channel)
    if channels < 1 or rest:
        raise class_swap.LeftAlone("imnet's inputs are not features, offset and cell")
    if reason := _differs(module, channels, "feature" in names):
        raise class_swap.LeftAlone(f"query_rgb is not LIIF's: {reason}")
    return _MIXINS[names], _verdict(module)


def _linears(module):
    linears = list(module.imnet.layers)[::2]
    return [linear.weight for linear in linears], [linear.bias for linear in linears]


def _form(module):
    return Form(bool(module.feat_unfold), bool(module.local_ensemble))


def _columns(module, channels):
    """How many inputs the MLP has for that many channels."""
    return feature_columns(channels, _form(module)) + (4 if module.cell_decode else 2)


class _Imnet(NamedTuple):
    """What the probe saw of the MLP."""

    type: type
    forward: object
    switches: tuple


def _verdict(module):
    """LIIF's flags may be the class's; mmagic's `eval_bsize` only cuts calls."""
    imnet = module.imnet
    found = _Imnet(type(imnet), type(imnet).forward, tuple(class_swap.switches(imnet).items()))
    verdict = class_swap.verdict(module, "query_rgb", found)
    flags = {flag: getattr(module, flag) for flag in FLAGS} | dict(verdict.switches)
    flags.pop("eval_bsize", None)
    return verdict._replace(switches=tuple(flags.items()))


def _decode(module, feat, coord, cell):
    """LIIF's output, or None if the original has to compute it."""
    cell = cell if module.cell_decode else None
    if reason := _why_not_this_call(module, feat, coord, cell):
        class_swap.as_before(module, reason)
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
    if reason := class_swap.why_changed(module) or why_not(module):
        return reason
    kind, forward, switches = module._inr_verdict.found
    if type(module.imnet) is not kind or kind.forward is not forward:
        return "its imnet has another class or forward"
    if nn.modules.module._has_any_global_hook():
        return "there is a hook on all modules"
    if reason := class_swap.why_switched(module.imnet, switches):
        return reason
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


_CACHES = weakref.WeakKeyDictionary()  # beside the modules, so that no pickle, copy or state_dict holds one


class _Decoder(class_swap.Accelerated):
    _inr_replace = staticmethod(replace)

    def _inr_forget(self):
        _CACHES.pop(self, None)


class _FeatureKept(_Decoder):
    def query_rgb(self, coord, cell=None):
        """The features are self.feat, as in yinboc/liif."""
        out = _decode(self, getattr(self, "feat", None), coord, cell)
        return super().query_rgb(coord, cell) if out is None else out


class _FeatureGiven(_Decoder):
    def query_rgb(self, feature, coord, cell=None):
        """The features are an argument, as in mmagic."""
        out = _decode(self, feature, coord, cell)
        return super().query_rgb(feature, coord, cell) if out is None else out


_MIXINS = {("coord", "cell"): _FeatureKept, ("feature", "coord", "cell"): _FeatureGiven}


def _differs(module, channels, feature_given):
    """Why query_rgb is not LIIF's, "" if on random numbers it is.

    The module itself, the random generators and the global settings stay as they are: what runs is its class on a
    shell with random weights (its own may hide a term that is still zero), in float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    with probe.quiet_and_plain() as random:
        feat = random((2, channels, *SIZE))
        shell = _shell(module, feat, generator)
        coord, cell = _queries(generator)
        feat = _give_features(shell, feat, feature_given, coord, cell)

        def queries(grad):
            return (t if grad else t.repeat(1, 5, 1) for t in (coord, cell))

        return probe.differs(
            shell,
            lambda grad: shell.query_rgb(*([feat] if feature_given else []), *queries(grad)),
            lambda grad: _decode_by_reference(shell, feat, *queries(grad)),
            [feat, *shell.imnet.parameters()],
            random,
            gradients=1e-2,  # a hidden unit that rounding takes over its ReLU's corner changes one summand of many
        )


def _shell(module, feat, generator):
    """An object of the module's class: its imnet copied, in float32 on the CPU; its other modules just return feat."""
    imnet = copy.deepcopy(module.imnet).to_empty(device="cpu").float().requires_grad_()
    shell = probe.shell(module, {name: _Stub(feat) for name in module._modules} | {"imnet": imnet})
    vars(shell).pop("feat", None)
    for kind in ("_parameters", "_buffers"):
        own = vars(module)[kind].items()
        vars(shell)[kind] = {name: None if t is None else torch.empty(t.shape, dtype=torch.float32) for name, t in own}
    with torch.no_grad():
        for tensor in (*shell._parameters.values(), *shell._buffers.values(), *imnet.parameters(), *imnet.buffers()):
            if tensor is not None:
                fan_in = tensor.shape[-1] if tensor.dim() > 1 else 9
                tensor.normal_(0, fan_in**-0.5, generator=generator)
    return shell


class _Stub(nn.Module):
    """An encoder, or a part of one, that has already done its work."""

    def __init__(self, feat):
        super().__init__()
        self.feat = feat

    def forward(self, *_, **__):
        return self.feat


def _give_features(shell, feat, feature_given, coord, cell):
    """Runs forward and gen_feat, which may set more than the features, and returns what query_rgb will read."""
    image = torch.rand(2, 3, *SIZE, dtype=torch.float32)
    with contextlib.suppress(Exception):  # it may ask more of its encoder than a stub has
        type(shell).forward(shell, image, coord, cell)
    if not feature_given:
        shell.gen_feat(image)
        return shell.feat
    with contextlib.suppress(Exception):  # it may ask more of its encoder than a stub has; query_rgb reads no self.feat
        shell.gen_feature(image)
    return feat


def _queries(generator):
    """coord and cell [2, Q, 2]: anywhere, outside too, and on pixel centres at x1 and x3, where rounding decides."""
    coord = []
    for n in SIZE:
        parts = [torch.rand(2, 24, generator=generator, dtype=torch.float32) * 5 - 2.5]
        for pixels in (n, 3 * n):
            # The last is at x3 the last pixel's centre, where both neighbours are one and areas vanish.
            centres = -1 + 1 / pixels + 2 / pixels * torch.arange(pixels, dtype=torch.float32)
            index = torch.randint(pixels, (2, 24), generator=generator)
            index[:, ::4] = (n - 1) * (pixels // n) + pixels // n // 2
            parts.append(centres[index])
        coord.append(torch.cat(parts, 1))
    coord = torch.stack(coord, -1)
    return coord, 0.8 * 0.01 ** torch.rand(
        coord.shape, generator=generator, dtype=torch.float32
    )  # scales from 0.5 to 50
