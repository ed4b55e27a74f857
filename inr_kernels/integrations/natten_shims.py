"""NATTEN's functions in plain PyTorch, to try a forward that calls them where they have no kernel or no gradient.

Attention weights may pass through anything between the two halves, scores and sums. Here they have an entry for every
key of the map, not for those of the window alone, so that softmax and dropout are what they are there.
"""

import math
import types

import torch

from inr_kernels.neighborhood_attention import neighborhood_attention_2d
from inr_kernels.neighborhood_attention.functional import check_pair


def functions(forward):
    """NATTEN's functions among the globals that a method reads, by name."""
    names = _STAND_INS.keys() & forward.__globals__.keys() & set(forward.__code__.co_names)
    return {name: forward.__globals__[name] for name in sorted(names)}


def with_stand_ins(forward):
    """The method with stand-ins for its functions, once for each value of NATTEN's switch, if it asks for that."""
    for fused in (False, True):
        stand_ins = _STAND_INS | {"is_fna_enabled": lambda fused=fused: fused}
        names = forward.__globals__ | {name: stand_ins[name] for name in functions(forward)}
        yield types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        if "is_fna_enabled" not in functions(forward):
            return


def _seen(size, kernel_size, dilation, is_causal):
    """[H W, H W]: which keys a query sees. Attention whose scores are zero spreads each key's mark."""
    marks = torch.eye(math.prod(size), dtype=torch.float32).view(1, *size, 1, -1)
    form = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal}
    return _fused(0 * marks, 0 * marks, marks, **form).view(math.prod(size), -1) > 0


def _scores(query, key, kernel_size, dilation=1, is_causal=False, rpb=None):
    """na2d_qk on [B, heads, H, W, dim], but with a score for every key of the map, -inf outside of the window."""
    size = query.shape[2:4]
    scores = query.flatten(2, 3) @ key.flatten(2, 3).mT
    if rpb is not None:
        if len(rpb) != query.shape[1]:
            raise ValueError(f"NATTEN's function gets {query.shape[1]} heads and a bias for {len(rpb)}")
        rows, cols = (
            ((torch.arange(n) - torch.arange(n)[:, None]) // d + side // 2).clamp(0, side - 1)
            for n, d, side in zip(size, check_pair(dilation, "dilation"), rpb.shape[1:], strict=True)
        )
        bias = rpb[:, rows[:, None, :, None], cols[None, :, None, :]]
        scores = scores + bias.flatten(3, 4).flatten(1, 2)
    return scores.masked_fill(~_seen(size, kernel_size, dilation, is_causal), -math.inf).unflatten(2, size)


def _scores_biased(query, key, rpb, *form):
    """natten2dqkrpb: before 0.14.5, the bias told the kernel's size."""
    kernel_size, dilation = form if len(form) == 2 else (rpb.shape[1] // 2 + 1, *form)
    return _scores(query, key, kernel_size, dilation, rpb=rpb)


def _mixed(attn, value, *form, **named):
    """na2d_av and natten2dav of such weights; before 0.14.6, without the kernel's size."""
    kernel_size, dilation = form if len(form) == 2 else (named.get("kernel_size"), named.get("dilation", 1))
    weights = attn.flatten(2, 3)
    if kernel_size is not None:
        weights = weights * _seen(value.shape[2:4], kernel_size, dilation, named.get("is_causal", False))
    return (weights @ value.flatten(2, 3)).unflatten(2, value.shape[2:4])


def _fused(query, key, value, **options):
    return neighborhood_attention_2d(query, key, value, **options, backend="reference")


_STAND_INS = {
    **dict.fromkeys(("neighborhood_attention_generic", "na2d", "experimental_na2d"), _fused),
    **dict.fromkeys(("natten2dqkrpb", "na2d_qk_with_bias"), _scores_biased),
    **dict.fromkeys(("natten2dav", "na2d_av"), _mixed),
    "na2d_qk": _scores,
    "is_fna_enabled": None,  # with_stand_ins sets it
}
