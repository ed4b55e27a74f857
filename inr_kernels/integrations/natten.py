"""NATTEN's NeighborhoodAttention2D, of any version, and the attention of NAT and DiNAT in HuggingFace's transformers.

A module is recognised by its attributes, and its forward is compared with ours on random numbers: outputs and
gradients. NATTEN's functions may have no kernel here (old versions, CUDA builds), and most have no CPU gradient. So
the forward runs with PyTorch versions of them (natten_shims.py), which checks all the code around them. Where the
forward also runs unchanged, that must agree too; elsewhere the functions are identified by their names. Large windows
are compared as smaller ones.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core import dispatch
from inr_kernels._core.checks import result_dtype
from inr_kernels._core.hooks import has_hooks
from inr_kernels.neighborhood_attention import neighborhood_attention_2d, neighborhood_attention_2d_packed
from inr_kernels.neighborhood_attention.arguments import Facts, check_axes
from inr_kernels.neighborhood_attention.module import NeighborhoodAttention

from . import class_swap, probe
from .class_swap import AcceleratedModule, Adapter, Match, Unsupported, register
from .natten_shims import natten_functions, with_shims

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WINDOW = {"kernel_size": None, "dilation": 1, "stride": 1, "is_causal": False}  # attributes and their defaults
# Sizes of the maps to compare on, relative to the window: one that fits, one that lacks a row, one that lacks a column.
SIZES = (2, 3), (-1, 2), (1, -1)


class Kind(NamedTuple):
    """The attribute names of a family. layers: its projections, and their outputs in multiples of the channels."""

    heads: str
    width: str
    layers: tuple[tuple[str, int], ...]
    dropout: str
    others: tuple[str, ...]
    returns: type


NATTEN = Kind("num_heads", "head_dim", (("qkv", 3), ("proj", 1)), "attn_drop", ("scale", "proj_drop"), torch.Tensor)
TRANSFORMERS = Kind(
    *("num_attention_heads", "attention_head_size", (("query", 1), ("key", 1), ("value", 1)), "dropout"),
    *(("rpb",), tuple),
)


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has all attributes of one of the families, including a window, and is not ours."""
    return _kind(module) is not None and not isinstance(module, NeighborhoodAttention)


def verify(module: nn.Module) -> Match:
    """The match of one attention module; Unsupported if it is not neighborhood attention in two dimensions."""
    kind = _kind(module)
    signature, mixin, ours = _FORWARDS[kind]
    class_swap.check_method(module, "forward", [signature])
    _check_parts(module, kind)
    key = _description(module, kind)
    details = _VERIFIED.get(key) or _Details(kind, _pads_small_maps(module, ours))
    if key is not None:
        _VERIFIED[key] = details
    return class_swap.match(module, mixin, "forward", details)


class _Details(NamedTuple):
    """pads: whether a map that is smaller than the window is padded, as NATTEN did up to version 0.15."""

    kind: Kind
    pads: bool


_VERIFIED: dict[tuple | None, _Details] = {}  # results by description: a network has few different layers


def _description(module, kind):
    """Everything that decides the comparison's result, None if an attribute cannot be described."""
    flags, forward = class_swap.plain_attributes(module), type(module).forward
    if vars(module).keys() - vars(nn.Module()).keys() - flags.keys():
        return None
    own = [vars(cls).items() for cls in type(module).__mro__ if cls not in nn.Module.__mro__]
    plain = (bool, str, int, float)
    methods = [(name, value) for items in own for name, value in items if callable(value) or isinstance(value, plain)]
    parts = [getattr(module, name).bias is None for name, _ in kind.layers] + [_rpb(module) is None]
    return type(module), *flags.items(), *methods, *natten_functions(forward).items(), *parts


def _pads_small_maps(module, ours):
    """Compares the module with ours: Unsupported if they differ, else whether it pads small maps."""
    forward, window = type(module).forward, _small_window(module)
    sides = [k * d for k, d in zip(window["kernel_size"], window["dilation"], strict=True)]
    fitting, *small = ([max(1, side + more) for side, more in zip(sides, mores, strict=True)] for mores in SIZES)
    reason = ""
    with contextlib.suppress(Exception):  # usually because there is no kernel for a CPU
        reason = _why_different(module, forward, ours, fitting, grad=False)
    _require_same(reason)
    pads = []
    for shimmed in with_shims(forward):
        _require_same(_why_different(module, shimmed, ours, fitting))
        pads += [_accepts(module, shimmed, ours, size) for size in small]
    return all(pads)


def _kind(module):
    for kind in _FORWARDS:
        if all(hasattr(module, name) for name in _attributes(kind)):
            return kind
    return None


def _attributes(kind):
    return "kernel_size", kind.heads, kind.width, *(name for name, _ in kind.layers), *kind.others


def _check_parts(module, kind):
    """Raises Unsupported unless the window has two dimensions and the layers fit heads of equal width."""
    try:
        kernel_size, _ = _kernel_size_and_dilation(module)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    channels = _channels(module, kind)
    for name, times in kind.layers:
        layer = getattr(module, name)
        if not isinstance(layer, nn.Linear) or (layer.in_features, layer.out_features) != (channels, times * channels):
            raise Unsupported(f"{name} is not a Linear from {channels} (heads x width) to {times * channels}")
    rpb, expected = _rpb(module), (getattr(module, kind.heads), *(2 * k - 1 for k in kernel_size))
    if rpb is not None and (not isinstance(rpb, torch.Tensor) or rpb.shape != expected):
        raise Unsupported(f"rpb does not have shape {list(expected)}")
    if kind is NATTEN and not isinstance(module.scale, (int, float)):
        raise Unsupported("scale is not a number")
    dropout = getattr(module, kind.dropout, None)
    if type(dropout) not in (type(None), nn.Dropout, nn.Identity):
        raise Unsupported(f"{kind.dropout} is not a Dropout")


def _require_same(reason):
    if reason:
        raise Unsupported(f"forward is not neighborhood attention: {reason}")


def _channels(module, kind):
    return getattr(module, kind.heads) * getattr(module, kind.width)


def _rpb(module):
    return getattr(module, "rpb", None)


def _window(module):
    return {name: getattr(module, name, default) for name, default in WINDOW.items()}


def _kernel_size_and_dilation(module):
    """Both as pairs."""
    window = _window(module)
    return check_axes(window["kernel_size"], "kernel_size", 2), check_axes(window["dilation"], "dilation", 2)


def _missing(module, x):
    """The number of rows and columns by which a map is smaller than the window."""
    pairs = zip(*_kernel_size_and_dilation(module), x.shape[1:3], strict=True)
    return tuple(max(0, k * d - n) for k, d, n in pairs)


def _attend_packed(module, x, backend=None):
    """NATTEN's forward, with the padding of small maps that it did up to version 0.15."""
    height, width = x.shape[1:3]
    below, right = _missing(module, x)
    x = F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x
    qkv = module.qkv(x).unflatten(3, (3, module.num_heads, module.head_dim))
    options = _window(module) | {"rpb": _rpb(module), "scale": module.scale, "backend": backend}
    out = neighborhood_attention_2d_packed(qkv, **options)
    return module.proj_drop(module.proj(out[:, :height, :width].flatten(3)))


def _attend(module, x, backend=None):
    """The forward of transformers, without the output projection, which is another module there."""
    heads = module.num_attention_heads, module.attention_head_size
    qkv = (layer(x).unflatten(3, heads) for layer in (module.query, module.key, module.value))
    return (neighborhood_attention_2d(*qkv, **_window(module), rpb=module.rpb, backend=backend).flatten(3),)


def _why_not_this_call(module, x):
    if reason := class_swap.why_changed(module):
        return reason
    kind, pads = module._inr_match.details
    if reason := _why_not_without_dropout(kind.dropout, getattr(module, kind.dropout, None)):
        return reason
    fits = (
        isinstance(x, torch.Tensor)
        and x.dtype in DTYPES
        and x.dim() == 4
        and x.numel() > 0
        and x.shape[3] == _channels(module, kind)
        and (pads or _missing(module, x) == (0, 0))
    )
    if not fits:
        return f"the input of a call is not [B, H, W, {_channels(module, kind)}] or is smaller than the window"
    if not (x.device.type == "cpu" or dispatch.requested_backend(None) or _has_default_kernel(module, kind, x)):
        return (
            f"on {x.device.type} our kernels are off: run `inr-kernels prove`, or with inr_kernels.backend('triton'):"
        )
    return ""


def _has_default_kernel(module, kind, x):
    """Whether one of our kernels runs this call without a request, as after a proof on a GPU."""
    if torch.compiler.is_compiling():  # which cannot trace the search
        return False
    facts = Facts(x.device, result_dtype(x), _rpb(module) is not None, dim=getattr(module, kind.width))
    return dispatch.OPS["neighborhood_attention"].default(facts) != "reference"


def _why_not_without_dropout(name, dropout):
    """Why the dropout of attention weights, which the fused kernels do not support, cannot be skipped."""
    if dropout is None:
        return ""
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"{name} is not a Dropout"
    if dropout.training and getattr(dropout, "p", 0) > 0:
        return f"{name} drops attention weights in training"
    hooked = has_hooks(dropout) or nn.modules.module._has_any_global_hook()
    return f"a hook on {name} or on all modules is registered" if hooked else ""


class _Packed(AcceleratedModule):
    def forward(self, x):
        """NATTEN's forward."""
        if class_swap.falls_back(self, _why_not_this_call(self, x)):
            return super().forward(x)
        return _attend_packed(self, x)


class _Separate(AcceleratedModule):
    def forward(self, hidden_states, output_attentions=False):
        """The forward of transformers."""
        reason = "output_attentions requests the weights" if output_attentions else ""
        if class_swap.falls_back(self, reason or _why_not_this_call(self, hidden_states)):
            return super().forward(hidden_states, output_attentions)
        return _attend(self, hidden_states)


_FORWARDS = {
    NATTEN: ((("x",),), _Packed, _attend_packed),
    TRANSFORMERS: ((("hidden_states",), ("output_attentions", False)), _Separate, _attend),
}


def _accepts(module, forward, ours, size):
    """Whether a forward accepts a map that is smaller than the window. If so, its result must agree with ours."""
    try:
        reason = _why_different(module, forward, ours, size)
    except Exception:  # the original may raise anything
        return False
    _require_same(reason)
    return True


def _why_different(module, forward, ours, size, grad=True):
    """Why a forward differs from ours on random numbers, "" if it does not; in float32 on the CPU, with random weights.

    grad: whether to compare gradients too, not only outputs.
    """
    kind = _kind(module)
    with probe.sandbox() as random:
        small, leaves = _with_random_weights(module, kind, random)
        x = random((2, *size, _channels(module, kind)))

        def theirs(_):
            with contextlib.nullcontext() if grad else torch.no_grad():
                try:
                    out = forward(small, x)
                except (Exception, KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:  # transformers raises a BaseException where NATTEN is missing
                    raise NotImplementedError(f"{type(error).__name__}: {error}") from error
            if not isinstance(out, kind.returns):
                raise Unsupported(f"forward must return a {kind.returns.__name__}; got {type(out).__name__}")
            return out

        leaves = [x, *leaves] if grad else []
        return probe.why_different(small, theirs, lambda _: ours(small, x, "reference"), leaves, random, gradients=1e-4)


def _with_random_weights(module, kind, random):
    """An object of the module's class with a small window, random weights and no dropout; and its leaves."""
    window, channels, layers = _small_window(module), _channels(module, kind), {}
    for name, times in kind.layers:
        bias = getattr(module, name).bias is not None
        layers[name] = nn.Linear(channels, times * channels, bias=bias, device="meta")
        weights = {"weight": random((times * channels, channels), channels**-0.5)}
        layers[name]._parameters.update(weights | ({"bias": random((times * channels,))} if bias else {}))
    drops = {kind.dropout: nn.Dropout(0.0), "proj_drop": _Sine()}
    drops = {name: drop for name, drop in drops.items() if hasattr(module, name)}
    small = probe.without_weights(module, layers | drops)
    for name in WINDOW.keys() & vars(module).keys():
        value = vars(module)[name]
        vars(small)[name] = type(value)(window[name]) if isinstance(value, (list, tuple)) else window[name][0]
    if "window_size" in vars(module):  # up to 0.15, where kernel_size and dilation are numbers
        vars(small)["window_size"] = window["kernel_size"][0] * window["dilation"][0]
    if hasattr(module, "rpb"):
        shape = getattr(module, kind.heads), *(2 * k - 1 for k in window["kernel_size"])
        small._parameters["rpb"] = None if module.rpb is None else random(shape)
    named = [(f"{name}.{part}", leaf) for name, layer in layers.items() for part, leaf in layer.named_parameters()]
    # The key's bias shifts all scores of a query equally, so its gradient is rounding error.
    leaves = [leaf for name, leaf in named if name != "key.bias"]
    return small, leaves + [leaf for leaf in small._parameters.values() if leaf is not None]


class _Sine(nn.Module):
    """Replaces the last dropout, so that a forward that skips it or calls it twice gives another result."""

    def forward(self, x):
        return x.sin()


def _small_window(module):
    """A window to compare with, as pairs: of the same parity, and dilated, strided and causal where the module's is."""
    window = _window(module)
    kernel_size, dilation = _kernel_size_and_dilation(module)
    window["kernel_size"] = tuple(min(k, 2 + k % 2) for k in kernel_size)
    window["dilation"] = tuple(min(d, 2) for d in dilation)
    stride = check_axes(window["stride"], "stride", 2)
    window["stride"] = tuple(min(s, k) for s, k in zip(stride, window["kernel_size"], strict=True))
    causal = window["is_causal"]
    window["is_causal"] = (causal, causal) if isinstance(causal, bool) else causal
    return window


_NAMES = {f"NeighborhoodAttention{n}D": _attributes(NATTEN) for n in (1, 2, 3)}
_NAMES |= {"NeighborhoodAttention": _attributes(TRANSFORMERS)}

ADAPTER = register(Adapter("neighborhood attention", is_candidate, verify, _NAMES))
