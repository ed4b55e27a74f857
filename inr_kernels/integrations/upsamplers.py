"""The attention of NAF and AnyUp, by which each pixel of a large map attends to a window of a small one.

Both enlarge keys and values to the queries' size and set the dilation to the ratio; the op takes the small ones. Their
forward is compared with ours where NATTEN's functions have PyTorch code in their place (natten_shims.py).
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from inr_kernels._core import dispatch
from inr_kernels._core.checks import has_autocast
from inr_kernels.neighborhood_attention import neighborhood_attention_2d
from inr_kernels.neighborhood_attention.arguments import check_axes

from . import class_swap, probe
from .class_swap import AcceleratedModule, Adapter, Match, Unsupported, register
from .filter_dtypes import are_supported
from .natten_shims import natten_functions, with_shims

RATIO, KEYS, WIDTH = (2, 3), (4, 5), 3  # of the problem to compare on; the width of a head


class Kind(NamedTuple):
    """One project's module: its attributes, the signature of its forward, and ours."""

    attributes: tuple[str, ...]
    signature: class_swap.Signature
    ours: Callable[..., torch.Tensor]


def naf(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str | None = None
) -> torch.Tensor:
    """NAF's output: q [B, heads d, H, W], k, v [B, heads d, Hk, Wk] -> [B, heads d_v, H, W]."""
    heads: Any = module.num_heads
    window: Any = module.kernel_size
    q, k, v = (_heads_last(t.to(q.dtype), heads) for t in (q, k, v))
    out: Any = neighborhood_attention_2d(q, k, v, window, backend=backend)
    return out.permute(0, 3, 4, 1, 2).flatten(1, 2)


def anyup(
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel_size: int | tuple[int, int],
    backend: str | None = None,
) -> torch.Tensor:
    """AnyUp's output, the mean over the heads of attention to v [B, C, Hk, Wk]: [B, C, H, W]."""
    heads: Any = module.num_heads
    dtype, layers = q.dtype, (module.q_proj, module.k_proj)
    q, k = (_heads_last(layer(t).to(dtype), heads) for layer, t in zip(layers, (q, k), strict=True))  # type: ignore[operator]
    value = v.to(dtype).permute(0, 2, 3, 1).unsqueeze(3)
    out: Any = neighborhood_attention_2d(q, k, value, kernel_size, mean_heads=True, backend=backend)
    return out.permute(0, 3, 1, 2)


def _heads_last(x, heads):
    """[B, heads d, H, W] -> [B, H, W, heads, d]."""
    return x.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2)


_TENSORS = (("q",), ("k",), ("v",))
NAF = Kind(
    ("num_heads", "kernel_size", "scale", "_resize"),
    (*_TENSORS, ("image", None), ("return_weights", False), ("**kwargs",)),
    naf,
)
ANYUP = Kind(
    ("num_heads", "q_proj", "k_proj", "_to_natten", "_nearest_resize"),
    (*_TENSORS, ("kernel_size",), ("dilation",), ("**kwargs",)),
    anyup,
)


def is_candidate(module: nn.Module) -> bool:
    """Whether the module has all attributes of one of the two."""
    return _kind(module) is not None


def _kind(module):
    return next((kind for kind in (NAF, ANYUP) if all(hasattr(module, name) for name in kind.attributes)), None)


def verify(module: nn.Module) -> Match:
    """The match of one attention module; Unsupported if it computes something else."""
    kind = _kind(module)
    class_swap.check_method(module, "forward", [kind.signature])
    heads = module.num_heads
    if type(heads) is not int or heads < 1:
        raise Unsupported(f"num_heads must be a positive integer; got {heads}")
    if kind is NAF and not isinstance(module.scale, float):
        raise Unsupported(f"scale must be a float; got {module.scale}")
    forward = type(module).forward
    if not natten_functions(forward) and "legacy_attention" not in forward.__code__.co_names:
        raise Unsupported("forward calls none of NATTEN's functions")
    compare = _why_naf_differs if kind is NAF else _why_anyup_differs
    for shimmed in with_shims(forward):
        if reason := compare(module, shimmed):
            raise Unsupported(f"forward is not cross-scale neighborhood attention: {reason}")
    match = class_swap.match(module, _Naf if kind is NAF else _Anyup, "forward")
    # NAF's forward sets it, to the ratio of the call.
    return match._replace(attributes=tuple(pair for pair in match.attributes if pair[0] != "dilation"))


def _why_naf_differs(module, forward):
    kernel_size = check_axes(module.kernel_size, "kernel_size", 2)
    with probe.sandbox() as random:
        q, k, v = leaves = _leaves(random, module.num_heads * WIDTH, module.num_heads * (WIDTH + 1))
        image = random((2, 3, *q.shape[2:])).detach()  # NAF passes it; a forward that reads it is another
        bare = probe.without_weights(module, {})
        vars(bare)["kernel_size"], vars(bare)["scale"] = (
            tuple(min(size, 2 + size % 2) for size in kernel_size),
            WIDTH**-0.5,
        )
        return probe.why_different(
            bare,
            lambda _: forward(copy.copy(bare), q, k, v, image),
            lambda _: naf(bare, q, k, v, "reference"),
            leaves,
            random,
        )


def _why_anyup_differs(module, forward):
    heads = module.num_heads
    with probe.sandbox() as random:
        q, k, v = leaves = _leaves(random, heads * WIDTH, 5)
        layers = {name: _Scaled(random((heads * WIDTH, 1, 1))) for name in ("q_proj", "k_proj")}
        bare = probe.without_weights(module, layers)
        ratio = {"kernel_size": (3, 2), "dilation": RATIO}
        return probe.why_different(
            bare,
            lambda _: forward(bare, q, k, v, **ratio),
            lambda _: anyup(bare, q, k, v, (3, 2), "reference"),
            [*leaves, *(layer.factors[0] for layer in layers.values())],
            random,
        )


def _leaves(random, channels, value_channels):
    """q, k, v."""
    size = tuple(n * r for n, r in zip(KEYS, RATIO, strict=True))
    return [random((2, channels, *size)), random((2, channels, *KEYS)), random((2, value_channels, *KEYS))]


class _Scaled(nn.Module):
    """Replaces a projection."""

    def __init__(self, factors):
        super().__init__()
        self.factors = [factors]  # no parameter: it is a leaf of the comparison

    def forward(self, x):
        return (self.factors[0] * x).sin()


def _why_not_this_call(module, q, k, v, kernel_size, options):
    """Why a call uses the original forward.

    options: the names of its further arguments, but for NAF's image, which its forward does not read.
    """
    if reason := class_swap.why_changed(module):
        return reason
    if options:
        return f"{' and '.join(options)} is given"
    if not are_supported(q, k, v) or any(t.dim() != 4 for t in (q, k, v)) or k.shape[2:] != v.shape[2:]:
        return class_swap.UNSUPPORTED_CALL
    if any(n % m for n, m in zip(q.shape[2:], k.shape[2:], strict=True)):
        return "the size of q is no multiple of that of k"
    if any(size > n for size, n in zip(check_axes(kernel_size, "kernel_size", 2), k.shape[2:], strict=True)):
        return "the window is larger than k"
    if has_autocast(q):
        return "autocast is enabled"
    if q.device.type != "cpu" and not dispatch.requested_backend(None):
        return f"on {q.device.type} our kernels are off: use them with inr_kernels.backend('triton'):"
    return ""


class _Naf(AcceleratedModule):
    def forward(self, q, k, v, image=None, return_weights=False, **kwargs):
        """NAF's forward."""
        options = [*(["return_weights"] if return_weights else []), *kwargs]
        reason = _why_not_this_call(self, q, k, v, self.kernel_size, options)
        if not reason:
            width = q.shape[1] // self.num_heads
            if not (width and isinstance(self.scale, float) and abs(self.scale - width**-0.5) <= 1e-6):
                reason = "scale is not that of q's heads"
        if class_swap.falls_back(self, reason):
            return super().forward(q, k, v, image=image, return_weights=return_weights, **kwargs)
        self.dilation = tuple(n // m for n, m in zip(q.shape[2:], k.shape[2:], strict=True))
        return naf(self, q, k, v)


class _Anyup(AcceleratedModule):
    def forward(self, q, k, v, kernel_size, dilation, **kwargs):
        """AnyUp's forward."""
        reason = _why_not_this_call(self, q, k, v, kernel_size, kwargs)
        if not reason:
            ratio = [n // m for n, m in zip(q.shape[2:], k.shape[2:], strict=True)]
            if list(check_axes(dilation, "dilation", 2)) != ratio:
                reason = "the dilation is not the ratio of q's size to k's"
        if class_swap.falls_back(self, reason):
            return super().forward(q, k, v, kernel_size, dilation, **kwargs)
        return anyup(self, q, k, v, kernel_size)


ADAPTER = register(Adapter("cross-scale attention", is_candidate, verify, {"NATTENCrossAttention": ANYUP.attributes}))
