"""NATTEN's functions in plain PyTorch, to run a forward that calls them where they have no kernel or no gradient.

Between computing scores and the weighted sum, a forward may apply any function to the attention weights. Here the
weights have an entry for every key of the map, zero outside the window, so that softmax and dropout compute the same.
"""

import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from inr_kernels.neighborhood_attention import neighborhood_attention_2d
from inr_kernels.neighborhood_attention.arguments import check_axes


def natten_functions(forward: types.FunctionType) -> dict[str, Callable]:
    """NATTEN's functions among the globals that a method reads, by name."""
    names = _SHIMS.keys() & forward.__globals__.keys() & set(forward.__code__.co_names)
    return {name: forward.__globals__[name] for name in sorted(names)}


def with_shims(forward: types.FunctionType) -> Iterator[types.FunctionType]:
    """The method with PyTorch versions of NATTEN's functions; once for each value of is_fna_enabled() if read."""
    for fused in (False, True):
        shims: dict[str, Any] = _SHIMS | {"is_fna_enabled": lambda fused=fused: fused}
        names = forward.__globals__ | {name: shims[name] for name in natten_functions(forward)}
        for name, helper in _helpers(forward).items():
            names[name] = types.FunctionType(helper.__code__, names, name, helper.__defaults__, helper.__closure__)
            names |= {name: shims[name] for name in natten_functions(helper)}
        yield types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        if "is_fna_enabled" not in natten_functions(forward):
            return


def _helpers(forward):
    """The functions of its file that a method calls and that read functions of NATTEN, by name."""
    found = {name: forward.__globals__.get(name) for name in forward.__code__.co_names if name not in _SHIMS}
    own = {name: f for name, f in found.items() if getattr(f, "__globals__", None) is forward.__globals__}
    return {name: f for name, f in own.items() if isinstance(f, types.FunctionType) and natten_functions(f)}


def _window_mask(size, kernel_size, dilation, is_causal):
    """[H W, H W] bool: which keys are in the window of a query. Found by uniform attention over one-hot values."""
    one_hot = torch.eye(math.prod(size), dtype=torch.float32, device="cpu").view(1, *size, 1, -1)
    window = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal}
    return _attention(0 * one_hot, 0 * one_hot, one_hot, **window).view(math.prod(size), -1) > 0


def _scores(query, key, kernel_size, dilation=1, is_causal=False, rpb=None):
    """na2d_qk on [B, heads, H, W, dim], but with a score for every key of the map, -inf outside the window."""
    size = query.shape[2:4]
    scores = query.flatten(2, 3) @ key.flatten(2, 3).mT
    if rpb is not None:
        if len(rpb) != query.shape[1]:
            raise ValueError(f"NATTEN's function got {query.shape[1]} heads and a bias for {len(rpb)}")
        index = functools.partial(torch.arange, dtype=torch.long, device=rpb.device)
        rows, cols = (
            ((index(n) - index(n)[:, None]) // d + side // 2).clamp(0, side - 1)
            for n, d, side in zip(size, check_axes(dilation, "dilation", 2), rpb.shape[1:], strict=True)
        )
        bias = rpb[:, rows[:, None, :, None], cols[None, :, None, :]]
        scores = scores + bias.flatten(3, 4).flatten(1, 2)
    return scores.masked_fill(~_window_mask(size, kernel_size, dilation, is_causal), -math.inf).unflatten(2, size)


def _scores_with_bias(query, key, rpb, *window):
    """natten2dqkrpb and na2d_qk_with_bias. Before 0.14.5, the kernel size was derived from the bias."""
    kernel_size, dilation = window if len(window) == 2 else (rpb.shape[1] // 2 + 1, *window)
    return _scores(query, key, kernel_size, dilation, rpb=rpb)


def _weighted_sum(attn, value, *window, **named):
    """na2d_av and natten2dav with weights for every key of the map. Before 0.14.6, without the kernel size."""
    kernel_size, dilation = window if len(window) == 2 else (named.get("kernel_size"), named.get("dilation", 1))
    weights = attn.flatten(2, 3)
    if kernel_size is not None:
        weights = weights * _window_mask(value.shape[2:4], kernel_size, dilation, named.get("is_causal", False))
    return (weights @ value.flatten(2, 3)).unflatten(2, value.shape[2:4])


def _attention(query, key, value, **options):
    return neighborhood_attention_2d(query, key, value, **options | {"backend": "reference"})


_SHIMS = {
    **dict.fromkeys(("neighborhood_attention_generic", "na2d", "experimental_na2d"), _attention),
    **dict.fromkeys(("natten2dqkrpb", "na2d_qk_with_bias"), _scores_with_bias),
    **dict.fromkeys(("natten2dav", "na2d_av"), _weighted_sum),
    "na2d_qk": _scores,
    "is_fna_enabled": None,  # set by with_shims
}
