"""The neighborhood attention of HDiT (k-diffusion's image_transformer_v2), a block around NATTEN's functions.

All code around the attention stays the module's own: its forward runs with a `natten` of this package's functions in
the place of the global of that name, which is None where NATTEN is missing. It is compared with the same forward on the
functions that store the attention weights, which are other code.
"""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from inr_kernels._core import dispatch

from . import class_swap, probe
from .class_swap import AcceleratedModule, Adapter, Match, Unsupported, register
from .natten_api import fused, unfused

NAME = "natten"
ATTRIBUTES = ("d_head", "n_heads", "kernel_size", "norm", "qkv_proj", "pos_emb", "out_proj")
SIGNATURE = (("x",), ("pos",), ("cond",))
FUSED = types.SimpleNamespace(has_fused_na=lambda: True, functional=fused)
UNFUSED = types.SimpleNamespace(has_fused_na=lambda: False, functional=unfused)
# By the names of globals of the forward's file; these are no identifiers, so no code uses them.
NATTENS = {"inr_kernels natten": FUSED, "inr_kernels unfused natten": UNFUSED}


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has the block's attributes, and its forward reads a global `natten`."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and NAME in code.co_names and all(hasattr(module, name) for name in ATTRIBUTES)


def verify(module: nn.Module) -> Match:
    """The match of one block; Unsupported if its forward depends on how NATTEN computes."""
    class_swap.check_method(module, "forward", [SIGNATURE])
    linear = getattr(module.norm, "linear", None)
    if not isinstance(linear, nn.Linear):
        raise Unsupported("its norm has no Linear of the condition")
    if type(module.kernel_size) is not int:
        raise Unsupported(f"kernel_size must be an integer; got {module.kernel_size}")
    forward = type(module).forward
    if reason := _why_different(module, forward, linear.in_features):
        raise Unsupported(f"forward is not neighborhood attention: {reason}")
    return class_swap.match(module, _Block, "forward", _calling(forward, "inr_kernels natten"))


@functools.lru_cache(16)
def _calling(forward: types.FunctionType, alias: str) -> Callable[..., Any]:
    """The method, with the globals of its module, but with another `natten`; the same object at each call."""
    forward.__globals__[alias] = NATTENS[alias]
    code = forward.__code__
    # co_names also holds names of attributes: one called `natten` would be renamed too, and `verify` refuse the block.
    code = code.replace(co_names=tuple(alias if name == NAME else name for name in code.co_names))
    named = forward.__name__, forward.__defaults__, forward.__closure__
    return types.FunctionType(code, forward.__globals__, *named)


def _why_different(module, forward, conditions):
    """Why the forward differs with fused and unfused functions, "" if it does not; a copy with random weights."""
    with probe.sandbox() as random, torch.compiler.set_stance("force_eager"):
        twin = copy.deepcopy(module).to("cpu", torch.float32)
        twin.kernel_size = min(module.kernel_size, 2 + module.kernel_size % 2)
        for layer in twin.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        with torch.no_grad():
            for parameter in twin.parameters():
                values = random(parameter.shape, 0.3)
                # Of the scales of the cosine similarity, the forward takes the root.
                parameter.copy_(values.abs() if parameter.dim() == 1 else values).requires_grad_()
        size = twin.kernel_size, twin.kernel_size + 1
        x, cond = random((2, *size, module.d_head * module.n_heads)), random((2, conditions))
        pos = random((*size, 2)).detach()
        ours, theirs = (_calling(forward, alias) for alias in NATTENS)
        with dispatch.backend("reference"):
            return probe.why_different(
                twin,
                lambda _: theirs(twin, x, pos, cond),
                lambda _: ours(twin, x, pos, cond),
                [x, cond, *twin.parameters()],
                random,
                gradients=1e-4,
            )


def _why_not_this_call(module, x):
    if reason := class_swap.why_changed(module):
        return reason
    has_natten = module._inr_match.original.__globals__.get(NAME) is not None
    if has_natten and x.device.type != "cpu" and not dispatch.requested_backend(None):
        return f"on {x.device.type} NATTEN's kernels run: use ours with inr_kernels.backend('triton'):"
    return ""


class _Block(AcceleratedModule):
    def forward(self, x, pos, cond):
        """The block's forward."""
        if class_swap.falls_back(self, _why_not_this_call(self, x)):
            return super().forward(x, pos, cond)
        return self._inr_match.details(self, x, pos, cond)


ADAPTER = register(
    Adapter("HDiT's neighborhood attention", is_candidate, verify, {"NeighborhoodSelfAttentionBlock": ATTRIBUTES})
)
