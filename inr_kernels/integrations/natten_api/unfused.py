"""NATTEN's functions that store the attention weights, which it removed in version 0.20, in plain PyTorch.

    attn[b, h, i, t] = <query_i, key_t> + rpb[h, t - i],    out_i = sum_t attn[b, h, i, t] value_t

Tensors are heads first, [B, heads, ..., dim], and the weights [B, heads, ..., taps] have an entry for each key of the
window, as NATTEN orders them: the last axis varies fastest. Between both functions, any code may change the weights.
Gradients save the inputs only, of any order. Sums and products are in float32, of float64 in float64. The Functions
have no setup_context, so `torch.func` refuses them. On CUDA, gradients of keys and values may differ in their last bits
between runs: index_add_ adds in any order there.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from inr_kernels._core.backends import TensorCache
from inr_kernels._core.checks import require, require_tensor, shape
from inr_kernels.neighborhood_attention.arguments import check_axes, check_causal, window


def qk(
    rank: int,
    query: torch.Tensor,
    key: torch.Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    additional_keys: torch.Tensor | None = None,
    is_causal: bool | Sequence[bool] | None = False,
    rpb: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scores of query and key [B, heads, ..., dim], of `rank` axes: [B, heads, ..., taps + L].

    additional_keys: [B, heads, L, dim] or None. rpb: [heads, 2 K - 1 of each axis] or None. Scores of keys that a
    causal window excludes are -inf.
    """
    for tensor, name in ((query, "query"), (key, "key")):
        require_tensor(tensor, name, dims=(rank + 3,), like=query)
    if key.shape != query.shape:
        require(False, "key", f"have query's shape {shape(query)}", shape(key))
    size, heads = query.shape[2:-1], query.shape[1]
    keys, steps, seen, causal = _windows(tuple(size), rank, kernel_size, dilation, is_causal, query.device)
    scores = _Scores.apply(query.flatten(2, -2), key.flatten(2, -2), keys).unflatten(2, size)
    if rpb is not None:
        sides = [2 * k - 1 for k in check_axes(kernel_size, "kernel_size", rank)]
        require_tensor(rpb, "rpb", like=query)
        require(list(rpb.shape) == [heads, *sides], "rpb", f"have shape {[heads, *sides]}", shape(rpb))
        scores = scores + rpb.to(scores.dtype).flatten(1)[:, steps].unflatten(1, size)
    if causal:
        scores = scores.masked_fill(~seen.view(*size, -1), -torch.inf)
    if additional_keys is not None:
        require_tensor(additional_keys, "additional_keys", dims=(4,), like=query)
        more = query.flatten(2, -2).to(scores.dtype) @ additional_keys.mT.to(scores.dtype)
        scores = torch.cat([scores, more.unflatten(2, size)], -1)
    return scores.to(query.dtype)


def av(
    rank: int,
    attn: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    additional_values: torch.Tensor | None = None,
    is_causal: bool | Sequence[bool] | None = False,
) -> torch.Tensor:
    """The sums of value [B, heads, ..., dim] weighted by attn [B, heads, ..., taps + L]: [B, heads, ..., dim].

    additional_values: [B, heads, L, dim] or None. attn is rounded to value's dtype, as NATTEN does.
    """
    for tensor, name in ((attn, "attn"), (value, "value")):
        require_tensor(tensor, name, dims=(rank + 3,), like=attn)
    size = value.shape[2:-1]
    keys, _, seen, causal = _windows(tuple(size), rank, kernel_size, dilation, is_causal, value.device)
    taps = keys.shape[1]
    expected = [*value.shape[:-1], taps + (0 if additional_values is None else additional_values.shape[2])]
    require(list(attn.shape) == expected, "attn", f"have shape {expected}", shape(attn))
    attn = attn.to(value.dtype)
    weights = attn[..., :taps].flatten(2, -2)
    if causal:
        weights = weights.masked_fill(~seen, 0)
    out = _Sums.apply(weights, value.flatten(2, -2), keys)
    if additional_values is not None:
        require_tensor(additional_values, "additional_values", dims=(4,), like=attn)
        out = out + attn[..., taps:].flatten(2, -2).to(out.dtype) @ additional_values.to(out.dtype)
    return out.to(value.dtype).unflatten(2, size)


def _windows(size, rank, kernel_size, dilation, is_causal, device):
    """For every query and tap [N, taps]: the key's index, that of its bias, and whether the query sees it.

    The last result: whether any axis is causal. Only then may a query not see a key.
    """
    kernel_size, dilation = check_axes(kernel_size, "kernel_size", rank), check_axes(dilation, "dilation", rank)
    causal = check_causal(False if is_causal is None else is_causal, rank)
    if any(k * d > n for k, d, n in zip(kernel_size, dilation, size, strict=True)):
        rule = f"be at most {size}, the map's size, after multiplication by dilation {dilation}"
        require(False, "kernel_size", rule, kernel_size)
    window = size, kernel_size, dilation, causal, device
    # The tensors of a dispatch mode or of a compiler belong to its graph; the cache holds no tensor of inference mode.
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return *_found_windows(*window), any(causal)
    with torch.inference_mode(False):
        return *_cached_windows(*window), any(causal)


def _found_windows(size, kernel_size, dilation, causal, device):
    keys = steps = torch.zeros(1, 1, dtype=torch.long, device=device)
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    for n, k, d, flag in zip(size, kernel_size, dilation, causal, strict=True):
        at, visible = window(n, k, d, 1, flag, device)
        step = (at - torch.arange(n, dtype=torch.long, device=device)[:, None]) // d + k - 1
        keys, steps, seen = (
            combine(before[:, None, :, None], new[None, :, None]).flatten(2).flatten(0, 1)
            for before, new, combine in (
                (keys, at, lambda a, b, n=n: a * n + b),
                (steps, step, lambda a, b, k=k: a * (2 * k - 1) + b),
                (seen, visible, torch.logical_and),
            )
        )
    return keys, steps, seen


_cached_windows = TensorCache(_found_windows, 16)


def _exact(a, b):
    """The dtype of the sums of products of two tensors."""
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


class _Scores(torch.autograd.Function):
    """out[n, t] = <a[n], b[keys[n, t]]>, in the dtype of the sums, as the next two."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """a, b [B, heads, N, dim], keys [N, taps] -> [B, heads, N, taps]."""
        ctx.save_for_backward(a, b, keys)
        a = a.to(_exact(a, b))
        return torch.stack([(a * b[:, :, at]).sum(-1) for at in keys.unbind(1)], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of a and b."""
        a, b, keys = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        d_a = _Sums.apply(grad, b, keys) if needs_a else None
        return d_a, _Scattered.apply(grad, a, keys) if needs_b else None, None


class _Sums(torch.autograd.Function):
    """out[n] = sum_t weights[n, t] b[keys[n, t]]."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, b: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """weights [B, heads, N, taps], b [B, heads, N, dim] -> [B, heads, N, dim]."""
        ctx.save_for_backward(weights, b, keys)
        out = torch.zeros_like(b, dtype=_exact(weights, b))
        for w, at in zip(weights.unbind(-1), keys.unbind(1), strict=True):
            out += w[..., None].to(out.dtype) * b[:, :, at]
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of weights and b."""
        weights, b, keys = ctx.saved_tensors
        needs_weights, needs_b, _ = ctx.needs_input_grad
        d_weights = _Scores.apply(grad, b, keys) if needs_weights else None
        return d_weights, _Scattered.apply(weights, grad, keys) if needs_b else None, None


class _Scattered(torch.autograd.Function):
    """out[m] = sum of weights[n, t] a[n] over the n, t with keys[n, t] = m."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, a: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """weights [B, heads, N, taps], a [B, heads, N, dim] -> [B, heads, N, dim]."""
        ctx.save_for_backward(weights, a, keys)
        out = torch.zeros_like(a, dtype=_exact(weights, a))
        for w, at in zip(weights.unbind(-1), keys.unbind(1), strict=True):
            out.index_add_(2, at, w[..., None].to(out.dtype) * a)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of weights and a."""
        weights, a, keys = ctx.saved_tensors
        needs_weights, needs_a, _ = ctx.needs_input_grad
        d_weights = _Scores.apply(a, grad, keys) if needs_weights else None
        return d_weights, _Sums.apply(weights, grad, keys) if needs_a else None, None


def _of(rank, function):
    """The function of `rank` axes, with the arguments of any of NATTEN's versions."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> torch.Tensor:
        return function(rank, *args, **options)

    return call


def _qk(rank, query, key, *window, **options):
    """`qk`; of three axes also with kernel_size_d, kernel_size, dilation_d, dilation, as in version 0.15."""
    return qk(rank, query, key, *_with_depth(rank, window, options), **options)


def _natten_qkrpb(rank, query, key, rpb, *window, **options):
    """`qk` as up to 0.16; before 0.14.5 with the dilation only: the kernel's size follows from that of the bias."""
    window = _with_depth(rank, window, options)
    if len(window) == 1 and not options and rpb is not None:
        sides = [(side + 1) // 2 for side in rpb.shape[1:]]
        window = sides[0] if rank == 1 else sides, *window
    return qk(rank, query, key, *window, **options, rpb=rpb)


def _qk_with_bias(rank, query, key, bias, *window, **options):
    """The same by the name that na*d_qk_with_bias has for the bias."""
    return _natten_qkrpb(rank, query, key, bias, *window, **options)


def _av(rank, attn, value, *window, **options):
    """`av`; of three axes also with the four numbers of version 0.15, as in `_qk`."""
    return av(rank, attn, value, *_with_depth(rank, window, options), **options)


def _natten_av(rank, attn, value, *window, **options):
    """`av`; before 0.14.6 with the dilation only: the kernel's size follows from the number of taps."""
    if len(window) == 1 and not options:
        window = round(attn.shape[-1] ** (1 / rank)), *window
    return _av(rank, attn, value, *window, **options)


def _with_depth(rank, window, options):
    """kernel_size and dilation, and what follows them, where version 0.15 had a number of its own for the depth."""
    if "kernel_size_d" in options:
        window = [options.pop(name) for name in ("kernel_size_d", "kernel_size", "dilation_d", "dilation")]
    if rank == 3 and len(window) >= 4 and all(type(number) is int for number in window[:4]):
        depth, side, dilation_d, dilation = window[:4]
        return (depth, side, side), (dilation_d, dilation, dilation), *window[4:]
    return window


RANKS = 1, 2, 3
na1d_qk, na2d_qk, na3d_qk = (_of(rank, _qk) for rank in RANKS)
na1d_av, na2d_av, na3d_av = (_of(rank, _av) for rank in RANKS)
na1d_qk_with_bias, na2d_qk_with_bias, na3d_qk_with_bias = (_of(rank, _qk_with_bias) for rank in RANKS)
natten1dqk, natten2dqk, natten3dqk = na1d_qk, na2d_qk, na3d_qk
natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = (_of(rank, _natten_qkrpb) for rank in RANKS)
natten1dav, natten2dav, natten3dav = (_of(rank, _natten_av) for rank in RANKS)
