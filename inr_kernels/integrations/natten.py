"""NATTEN's NeighborhoodAttention2D, of any version, and the attention of NAT and DiNAT in HuggingFace's transformers.

A module is known by its parts, and its forward is tried on random numbers, outputs and gradients. NATTEN's functions
may have no kernel here (old versions, CUDA builds) and mostly have no gradient on a CPU; so stand-ins take their
places in the forward's globals, and all around them is proven. Where the forward runs as it is, it must agree too;
where it does not, the functions are known by their names. Large windows are tried as smaller ones.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core import dispatch
from inr_kernels.neighborhood_attention import neighborhood_attention_2d, neighborhood_attention_2d_packed
from inr_kernels.neighborhood_attention.functional import check_pair

from . import class_swap, probe
from .natten_shims import functions, with_stand_ins

WHAT = "neighborhood attention"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORM = {"kernel_size": None, "dilation": 1, "stride": 1, "is_causal": False}  # and what holds where it is not said
# How much larger than its window a map is that a module is tried on: it fits, it lacks a row, it lacks a column.
SIZES = (2, 3), (-1, 2), (1, -1)


class Kind(NamedTuple):
    """How a family calls its parts; layers: its projections, and how many times the channels each gives."""

    heads: str
    width: str
    layers: tuple
    dropout: str
    others: tuple
    returns: type


NATTEN = Kind("num_heads", "head_dim", (("qkv", 3), ("proj", 1)), "attn_drop", ("scale", "proj_drop"), torch.Tensor)
TRANSFORMERS = Kind(
    *("num_attention_heads", "attention_head_size", (("query", 1), ("key", 1), ("value", 1)), "dropout"),
    *(("rpb",), tuple),
)


def is_candidate(module):
    """Whether it deserves a word in the log: it has all parts of one of the families, a window among them."""
    return _kind(module) is not None


def replace(module):
    """Accelerates one attention module, in place. Returns why it was left alone, "" if it was not."""
    return class_swap.attempt(module, _verify)


class _Found(NamedTuple):
    """What the probe learnt; pads: whether a map that is too small for a window is padded, as NATTEN did up to 0.15."""

    kind: Kind
    pads: bool


def _verify(module):
    kind = _kind(module)
    signature, mixin, ours = _FORWARDS[kind]
    if class_swap.signature(type(module), "forward") != signature:
        raise class_swap.LeftAlone(f"forward does not take ({', '.join(name for name, *_ in signature)})")
    if "forward" in vars(module):
        raise class_swap.LeftAlone("forward is patched on the object")
    _check_parts(module, kind)
    key = _description(module, kind)
    found = _PROVEN.get(key) or _Found(kind, _try(module, ours))
    if key is not None:
        _PROVEN[key] = found
    return mixin, class_swap.verdict(module, "forward", found)


_PROVEN = {}  # what was found for a description: a network has few kinds of layers


def _description(module, kind):
    """All that decides a trial's outcome, None if a value of the module's own cannot be told."""
    flags, forward = class_swap.switches(module), type(module).forward
    if vars(module).keys() - vars(nn.Module()).keys() - flags.keys():
        return None
    own = [vars(cls).items() for cls in type(module).__mro__ if cls not in nn.Module.__mro__]
    plain = (bool, str, int, float)
    methods = [(name, value) for items in own for name, value in items if callable(value) or isinstance(value, plain)]
    parts = [getattr(module, name).bias is None for name, _ in kind.layers] + [_rpb(module) is None]
    return type(module), *flags.items(), *methods, *functions(forward).items(), *parts


def _try(module, ours):
    """Whether the module pads; LeftAlone if it is not ours."""
    forward, form = type(module).forward, _small_form(module)
    sides = [k * d for k, d in zip(form["kernel_size"], form["dilation"], strict=True)]
    fitting, *small = ([max(1, side + more) for side, more in zip(sides, mores, strict=True)] for mores in SIZES)
    reason = ""
    with contextlib.suppress(Exception):  # no kernel for a CPU, mostly
        reason = _differs(module, forward, ours, fitting, grad=False)
    _demand(reason)
    pads = []
    for stand_in in with_stand_ins(forward):
        _demand(_differs(module, stand_in, ours, fitting))
        pads += [_takes(module, stand_in, ours, size) for size in small]
    return all(pads)


def _kind(module):
    for kind in _FORWARDS:
        names = "kernel_size", kind.heads, kind.width, *(name for name, _ in kind.layers), *kind.others
        if all(hasattr(module, name) for name in names):
            return kind
    return None


def _check_parts(module, kind):
    """LeftAlone unless the parts are those of a window in two dimensions, over heads of equal width."""
    try:
        kernel_size, _ = _window(module)
    except ValueError as error:
        raise class_swap.LeftAlone(str(error)) from None
    channels = _channels(module, kind)
    for name, times in kind.layers:
        layer = getattr(module, name)
        if not isinstance(layer, nn.Linear) or (layer.in_features, layer.out_features) != (channels, times * channels):
            raise class_swap.LeftAlone(f"{name} is no Linear from {channels} to {times * channels}, heads x width")
    rpb, expected = _rpb(module), (getattr(module, kind.heads), *(2 * k - 1 for k in kernel_size))
    if rpb is not None and (not isinstance(rpb, torch.Tensor) or rpb.shape != expected):
        raise class_swap.LeftAlone(f"rpb does not have shape {list(expected)}")
    if kind is NATTEN and not isinstance(module.scale, (int, float)):
        raise class_swap.LeftAlone("scale is no number")
    dropout = getattr(module, kind.dropout, None)
    if type(dropout) not in (type(None), nn.Dropout, nn.Identity):
        raise class_swap.LeftAlone(f"{kind.dropout} is no Dropout")


def _demand(reason):
    if reason:
        raise class_swap.LeftAlone(f"forward is not neighborhood attention as we know it: {reason}")


def _channels(module, kind):
    return getattr(module, kind.heads) * getattr(module, kind.width)


def _rpb(module):
    return getattr(module, "rpb", None)


def _form(module):
    return {name: getattr(module, name, default) for name, default in FORM.items()}


def _window(module):
    """kernel_size and dilation, as pairs."""
    form = _form(module)
    return check_pair(form["kernel_size"], "kernel_size"), check_pair(form["dilation"], "dilation")


def _missing(module, x):
    """The rows and columns that a map lacks for one window."""
    return tuple(max(0, k * d - n) for k, d, n in zip(*_window(module), x.shape[1:3], strict=True))


def _attend_packed(module, x, backend=None):
    """NATTEN's forward, with the padding that it had up to version 0.15."""
    height, width = x.shape[1:3]
    below, right = _missing(module, x)
    x = F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x
    qkv = module.qkv(x).unflatten(3, (3, module.num_heads, module.head_dim))
    form = _form(module) | {"rpb": _rpb(module), "scale": module.scale, "backend": backend}
    out = neighborhood_attention_2d_packed(qkv, **form)
    return module.proj_drop(module.proj(out[:, :height, :width].flatten(3)))


def _attend(module, x, backend=None):
    """The forward of transformers, where the output's projection is a module of its own."""
    heads = module.num_attention_heads, module.attention_head_size
    qkv = (layer(x).unflatten(3, heads) for layer in (module.query, module.key, module.value))
    return (neighborhood_attention_2d(*qkv, **_form(module), rpb=module.rpb, backend=backend).flatten(3),)


def _why_not_this_call(module, x):
    if reason := class_swap.why_changed(module):
        return reason
    kind, pads = module._inr_verdict.found
    if reason := _why_dropout(kind.dropout, getattr(module, kind.dropout, None)):
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
        return "the argument of a call is no map of these channels that a window fits into"
    if x.device.type != "cpu" and not dispatch.requested_backend(None):
        return f"on {x.device.type} our kernels run at a wish alone, with inr_kernels.backend('triton')"
    return ""


def _why_dropout(name, dropout):
    """Why the dropout of attention weights, which fused kernels have none of, cannot be passed over."""
    if dropout is None:
        return ""
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"{name} is no Dropout"
    if dropout.training and getattr(dropout, "p", 0) > 0:
        return f"{name} drops attention weights in training"
    hooked = class_swap.has_hooks(dropout) or nn.modules.module._has_any_global_hook()
    return f"there is a hook on {name} or on all modules" if hooked else ""


class _Packed(class_swap.Accelerated):
    _inr_replace = staticmethod(replace)

    def forward(self, x):
        """NATTEN's."""
        if reason := _why_not_this_call(self, x):
            class_swap.as_before(self, reason)
            return super().forward(x)
        return _attend_packed(self, x)


class _Separate(class_swap.Accelerated):
    _inr_replace = staticmethod(replace)

    def forward(self, hidden_states, output_attentions=False):
        """That of transformers."""
        reason = "output_attentions asks for the weights" if output_attentions else ""
        if reason := reason or _why_not_this_call(self, hidden_states):
            class_swap.as_before(self, reason)
            return super().forward(hidden_states, output_attentions)
        return _attend(self, hidden_states)


_FORWARDS = {
    NATTEN: ((("x",),), _Packed, _attend_packed),
    TRANSFORMERS: ((("hidden_states",), ("output_attentions", False)), _Separate, _attend),
}


def _takes(module, forward, ours, size):
    """Whether a forward takes a map that is too small; LeftAlone if it makes something else of it than we would."""
    try:
        reason = _differs(module, forward, ours, size)
    except Exception:  # whatever the original says of it
        return False
    _demand(reason)
    return True


def _differs(module, forward, ours, size, grad=True):
    """Why a forward is not ours, "" if on random numbers it is; in float32 on the CPU, without the module's weights.

    grad: whether gradients are compared; without, only outputs.
    """
    kind = _kind(module)
    with probe.quiet_and_plain() as random:
        shell, leaves = _shell(module, kind, random)
        x = random((2, *size, _channels(module, kind)))

        def theirs(_):
            with contextlib.nullcontext() if grad else torch.no_grad():
                try:
                    out = forward(shell, x)
                except (Exception, KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:  # in transformers, that NATTEN is not there is no Exception
                    raise NotImplementedError(f"{type(error).__name__}: {error}") from error
            if not isinstance(out, kind.returns):
                raise class_swap.LeftAlone(f"forward returns no {kind.returns.__name__} but {type(out).__name__}")
            return out

        leaves = [x, *leaves] if grad else []
        return probe.differs(shell, theirs, lambda _: ours(shell, x, "reference"), leaves, random, gradients=1e-4)


def _shell(module, kind, random):
    """An object of the module's class with a smaller window, layers with random weights and no dropout; its leaves."""
    form, channels, layers = _small_form(module), _channels(module, kind), {}
    for name, times in kind.layers:
        bias = getattr(module, name).bias is not None
        layers[name] = nn.Linear(channels, times * channels, bias=bias, device="meta")
        weights = {"weight": random((times * channels, channels), channels**-0.5)}
        layers[name]._parameters.update(weights | ({"bias": random((times * channels,))} if bias else {}))
    drops = {kind.dropout: nn.Dropout(0.0), "proj_drop": _Sine()}
    shell = probe.shell(module, layers | {name: drop for name, drop in drops.items() if hasattr(module, name)})
    for name in FORM.keys() & vars(module).keys():
        value = vars(module)[name]
        vars(shell)[name] = type(value)(form[name]) if isinstance(value, (list, tuple)) else form[name][0]
    if "window_size" in vars(module):  # up to 0.15, where kernel_size and dilation are numbers
        vars(shell)["window_size"] = form["kernel_size"][0] * form["dilation"][0]
    if hasattr(module, "rpb"):
        shape = getattr(module, kind.heads), *(2 * k - 1 for k in form["kernel_size"])
        shell._parameters["rpb"] = None if module.rpb is None else random(shape)
    named = [(f"{name}.{part}", leaf) for name, layer in layers.items() for part, leaf in layer.named_parameters()]
    leaves = [leaf for name, leaf in named if name != "key.bias"]  # it moves all scores: its gradient is mere rounding
    return shell, leaves + [leaf for leaf in shell._parameters.values() if leaf is not None]


class _Sine(nn.Module):
    """In the place of the last dropout: whoever leaves it out, or calls it twice, is seen."""

    def forward(self, x):
        return x.sin()


def _small_form(module):
    """The form that the module is tried in, as pairs: the window's parity, whether it is dilated, strided, causal."""
    form = _form(module)
    kernel_size, dilation = _window(module)
    form["kernel_size"] = tuple(min(k, 2 + k % 2) for k in kernel_size)
    form["dilation"] = tuple(min(d, 2) for d in dilation)
    stride = check_pair(form["stride"], "stride")
    form["stride"] = tuple(min(s, k) for s, k in zip(stride, form["kernel_size"], strict=True))
    causal = form["is_causal"]
    form["is_causal"] = (causal, causal) if isinstance(causal, bool) else causal
    return form
