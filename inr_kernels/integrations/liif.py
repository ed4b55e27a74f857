"""LIIF's decoder in other projects: yinboc/liif and its many copies, and mmagic's port.

`_why_not` checks the structure and `_why_different` compares the numbers; then the object's class is replaced by a
subclass that overrides `query_rgb`. Every call runs `_why_not` again, because hooks, layers and flags may change.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from inr_kernels._core.hooks import has_hooks
from inr_kernels.local_implicit.functional import Form, decode_queries, feature_columns
from inr_kernels.local_implicit.module import HoistCache, LocalImplicitDecoder, LocalTextureDecoder

from . import class_swap, probe
from .class_swap import AcceleratedModule, Adapter, Match, Unsupported, register

FLAGS = ("local_ensemble", "feat_unfold", "cell_decode")
SIZE = 5, 4  # of the features that the methods are compared on
# Not float64: our coordinates are float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has a method query_rgb and is neither ours nor similar to LTE's (lte.py)."""
    ours = isinstance(module, LocalImplicitDecoder | LocalTextureDecoder)
    texture = isinstance(getattr(module, "coef", None), nn.Conv2d)
    return callable(getattr(type(module), "query_rgb", None)) and not (ours or texture)


def verify(module: nn.Module) -> Match:
    """The match of one decoder; Unsupported if it is not LIIF's."""
    names = class_swap.check_method(module, "query_rgb", _MIXINS, defaults=False)
    if reason := _why_not(module):
        raise Unsupported(reason)
    imnet: Any = module.imnet
    per_channel = feature_columns(1, _form(module))
    channels, rest = divmod(imnet.layers[0].in_features - _columns(module, 0), per_channel)
    if channels < 1 or rest:
        raise Unsupported("imnet's inputs are not features, offset and cell")
    if reason := _why_different(module, channels, ("feature",) in names):
        raise Unsupported(f"query_rgb is not LIIF's: {reason}")
    attributes = class_swap.read_attributes(imnet, "forward")
    details = _Imnet(type(imnet), type(imnet).forward, tuple(attributes.items()))
    match = class_swap.match(module, _MIXINS[names], "query_rgb", details)
    # The flags may be attributes of the class.
    flags = {flag: getattr(module, flag) for flag in FLAGS}
    return match._replace(attributes=tuple((flags | dict(match.attributes)).items()))


class _Imnet(NamedTuple):
    """The MLP as it was when the methods were compared."""

    type: type[nn.Module]
    forward: Callable
    attributes: tuple[tuple[str, Any], ...]


def _why_not(module):
    """Why the structure is not LIIF's, "" if it is. Cheap: runs at every call."""
    if missing := [flag for flag in FLAGS if not hasattr(module, flag)]:
        return f"it has no attribute {missing[0]}"
    imnet = getattr(module, "imnet", None)
    layers = getattr(imnet, "layers", None)
    if type(layers) is not nn.Sequential:
        return "it has no imnet" if imnet is None else "imnet.layers is not an nn.Sequential"
    parts = list(layers)
    if len(parts) < 3 or [type(part) for part in parts] != [nn.Linear, nn.ReLU] * (len(parts) // 2) + [nn.Linear]:
        return f"imnet.layers must be Linear, ReLU, ..., Linear; got {', '.join(type(part).__name__ for part in parts)}"
    if has_hooks(imnet, layers, *parts):
        return "imnet or a layer of it has a hook or a patched forward"
    weights, biases = _linears(module)
    if any(bias is None for bias in biases):
        return "a layer of imnet has no bias"
    first, *others = params = [*weights, *biases]
    if any(p.dtype != first.dtype or p.device != first.device for p in others):
        return "the layers of imnet differ in dtype or device"
    if not first.is_floating_point():
        return f"imnet has weights in {first.dtype}"
    # Quantised and distributed weights are tensor subclasses. So are those that the compiler traces with.
    if not torch.compiler.is_compiling() and any(type(p) not in (torch.Tensor, nn.Parameter) for p in params):
        return "imnet has weights of a tensor subclass"
    return ""


def _linears(module):
    linears = list(module.imnet.layers)[::2]
    return [linear.weight for linear in linears], [linear.bias for linear in linears]


def _form(module: nn.Module) -> Form:
    return Form(bool(module.feat_unfold), bool(module.local_ensemble))


def _columns(module, channels):
    """The number of inputs of the MLP for that many channels."""
    return feature_columns(channels, _form(module)) + (4 if module.cell_decode else 2)


def _decode(module, feat, coord, cell):
    weights, biases = _linears(module)
    hoist = None
    if not torch.compiler.is_compiling():
        hoist = _CACHES.setdefault(module, HoistCache()).keyed(feat, weights[0], biases[0])
    cell = cell.float() if module.cell_decode else None
    out = decode_queries(feat, coord.float(), cell, weights, biases, _form(module), hoist=hoist)
    return out if out.dtype == coord.dtype else out.float()  # LIIF's ensemble weights have coord's dtype


def _decode_by_reference(module, feat, coord, cell):
    cell = cell if module.cell_decode else None
    return decode_queries(feat, coord, cell, *_linears(module), _form(module), backend="reference")


def _why_not_this_call(module, feat, coord, cell):
    if reason := class_swap.why_changed(module) or _why_not(module):
        return reason
    kind, forward, attributes = module._inr_match.details
    if type(module.imnet) is not kind or kind.forward is not forward:
        return "its imnet has another class or forward"
    if nn.modules.module._has_any_global_hook():
        return "a hook on all modules is registered"
    if reason := class_swap.why_attributes_changed(module.imnet, attributes):
        return reason
    weight = module.imnet.layers[0].weight
    tensors = [feat, coord, cell] if module.cell_decode else [feat, coord]
    fits = (
        all(isinstance(t, torch.Tensor) and t.dtype in DTYPES and t.device == weight.device for t in tensors)
        and (feat.dtype == weight.dtype or (torch.is_autocast_enabled(feat.device.type) and weight.dtype in DTYPES))
        and feat.device.type in ("cpu", "cuda")
        and (feat.dim(), coord.dim(), coord.shape[-1], len(coord)) == (4, 3, 2, len(feat))
        and (not module.cell_decode or cell.shape == coord.shape)
        and _columns(module, feat.shape[1]) == weight.shape[1]
        and min(feat.shape[1:]) > 0
    )
    return "" if fits else class_swap.UNSUPPORTED_CALL


# Outside the modules, so that no pickle, copy or state_dict contains one.
_CACHES: weakref.WeakKeyDictionary[nn.Module, HoistCache] = weakref.WeakKeyDictionary()


class _Decoder(AcceleratedModule):
    def _inr_drop_cache(self):
        _CACHES.pop(self, None)


class _StoredFeatures(_Decoder):
    def query_rgb(self, coord, cell=None):
        """Decodes self.feat, as in yinboc/liif."""
        feat = getattr(self, "feat", None)
        if class_swap.falls_back(self, _why_not_this_call(self, feat, coord, cell)):
            return super().query_rgb(coord, cell)
        return _decode(self, feat, coord, cell)


class _GivenFeatures(_Decoder):
    def query_rgb(self, feature, coord, cell=None):
        """Decodes an argument, as in mmagic."""
        if class_swap.falls_back(self, _why_not_this_call(self, feature, coord, cell)):
            return super().query_rgb(feature, coord, cell)
        return _decode(self, feature, coord, cell)


_MIXINS = {(("coord",), ("cell",)): _StoredFeatures, (("feature",), ("coord",), ("cell",)): _GivenFeatures}


def _why_different(module, channels, feature_given):
    """Why query_rgb differs from LIIF's on random numbers, "" if it does not.

    The module, the random generators and the global settings are not changed. The method runs on an object of the same
    class in float32 on the CPU, with random weights: the module's own may still multiply a term by zero.
    """
    generator = torch.Generator().manual_seed(0)
    with probe.sandbox() as random:
        feat = random((2, channels, *SIZE))
        model = _with_random_weights(module, feat, generator)
        coord, cell = queries(generator)
        feat = _give_features(model, feat, feature_given, coord, cell)

        def repeated(grad):
            return (t if grad else t.repeat(1, 5, 1) for t in (coord, cell))

        return probe.why_different(
            model,
            lambda grad: model.query_rgb(*([feat] if feature_given else []), *repeated(grad)),
            lambda grad: _decode_by_reference(model, feat, *repeated(grad)),
            [feat, *model.imnet.parameters()],
            random,
            gradients=1e-2,  # rounding may move a hidden unit across its ReLU's corner, which changes one of many terms
        )


def _with_random_weights(module, feat, generator):
    """An object of the module's class with a copy of its imnet, and stubs that return feat for its other modules."""
    imnet = copy.deepcopy(module.imnet).to_empty(device="cpu").float().requires_grad_()
    model = probe.without_weights(module, {name: Stub(feat) for name in module._modules} | {"imnet": imnet})
    vars(model).pop("feat", None)
    for kind in ("_parameters", "_buffers"):
        own = vars(module)[kind].items()
        vars(model)[kind] = {
            name: None if t is None else torch.empty(t.shape, dtype=torch.float32, device="cpu") for name, t in own
        }
    own = (*model._parameters.values(), *model._buffers.values(), *imnet.parameters(), *imnet.buffers())
    randomize([tensor for tensor in own if tensor is not None], generator)
    return model


@torch.no_grad()
def randomize(tensors: Iterable[torch.Tensor], generator: torch.Generator) -> None:
    """Fills parameters with random numbers of the size that layers have."""
    for tensor in tensors:
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 9
        tensor.normal_(0, fan_in**-0.5, generator=generator)


class Stub(nn.Module):
    """Replaces an encoder, or a part of one, and returns the features."""

    def __init__(self, feat: torch.Tensor):
        super().__init__()
        self.feat = feat

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """The features."""
        return self.feat


def _give_features(model, feat, feature_given, coord, cell):
    """Runs forward and gen_feat, which may set other attributes too; returns the features that query_rgb will read."""
    image = torch.rand(2, 3, *SIZE, dtype=torch.float32, device="cpu")
    with contextlib.suppress(Exception):  # forward may use attributes of the encoder that a stub lacks
        type(model).forward(model, image, coord, cell)
    if not feature_given:
        model.gen_feat(image)
        return model.feat
    with contextlib.suppress(Exception):  # as above; query_rgb does not read self.feat
        model.gen_feature(image)
    return feat


def queries(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """coord, cell [2, Q, 2]: random, also outside the image, and pixel centres at x1 and x3, where rounding decides."""
    axes = []
    for n in SIZE:
        parts = [torch.rand(2, 24, generator=generator, dtype=torch.float32, device="cpu") * 5 - 2.5]
        for pixels in (n, 3 * n):
            # At x3 the last one is the centre of the last pixel, where both neighbours are the same and areas vanish.
            centres = -1 + 1 / pixels + 2 / pixels * torch.arange(pixels, dtype=torch.float32, device="cpu")
            index = torch.randint(pixels, (2, 24), generator=generator, dtype=torch.long, device="cpu")
            index[:, ::4] = (n - 1) * (pixels // n) + pixels // n // 2
            parts.append(centres[index])
        axes.append(torch.cat(parts, 1))
    coord = torch.stack(axes, -1)
    scales = 0.01 ** torch.rand(coord.shape, generator=generator, dtype=torch.float32, device="cpu")
    return coord, 0.8 * scales  # cells of scales from 0.5 to 50


ADAPTER = register(Adapter("LIIF's decoder", is_candidate, verify))
