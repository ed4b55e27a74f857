"""The public functions of neighborhood attention: documentation, argument checks, autocast."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import (
    apply_autocast,
    require,
    require_match,
    require_tensor,
    result_dtype,
    shape,
    without_autocast,
)

from . import op
from .arguments import Arguments, Facts, check_axes, check_causal, check_tensors, exact, shape_facts

# What one channel adds to the scores of keys under a mask: exp(-LOWERED) is zero, and it fits float16.
LOWERED = 2.0**14


def _facts(
    query: torch.Tensor,
    key: Any = None,
    value: Any = None,
    *args: Any,
    rpb: Any = None,
    scale: Any = None,
    mean_heads: bool = False,
    **kwargs: Any,
) -> Facts:
    """What decides on the backend of a call, of which `explain` may be given query only, or the packed tensor."""
    key, value = (t if isinstance(t, torch.Tensor) else query for t in (key, value))
    return shape_facts(query, key, value, rpb is not None, scale, mean_heads, result_dtype(query), 2)


@op.OP.public(_facts)
def neighborhood_attention_2d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: torch.Tensor | None = None,
    scale: float | None = None,
    mean_heads: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes the attention of every pixel to a window of Kh x Kw pixels around it, with NATTEN's window rule.

        s_it  = scale <query_i, key_t> + rpb[h, (t_y - i_y) / d_y + Kh - 1, (t_x - i_x) / d_x + Kw - 1],  t in window(i)
        out_i = sum_t exp(s_it - lse_i) value_t,    lse_i = log sum_t exp(s_it)

    The window is the product of one window per axis. On an axis of length L, query i attends to its residue class
    i mod d, of n = ceil((L - i mod d) / d) pixels, in which it has position j = i // d:

        start = clamp(min(j // s * s + s // 2, n - 1) - K // 2, 0, n - K),   end = start + K

    So every query attends to K pixels, at the edges too: the window is shifted inwards, without padding. Queries of a
    group of s (stride) share a window; s = K is blocked attention. On a causal axis:

        lead = min(j // s * s + s - 1, n - 1),   start = max(lead - K + 1, 0),   end = j + 1

    Cross-scale attention: the keys may be of a lower resolution, Hk = H / r_y and Wk = W / r_x with integer ratios.
    Then (y, x) above is (y // r_y, x // r_x), the query's position among the keys, L is Hk or Wk, and kernel_size,
    dilation, stride and rpb count keys. The result is that of keys and values repeated r_y x r_x times with a dilation
    of r x d, but nothing is repeated: the memory is that of inputs and outputs. Where kernel_size is the size of the
    keys, every query attends to all keys, and any sizes fit.

    Args:
        query: [B, H, W, heads, dim], float32, float64, bfloat16 or float16 (half precision accumulates in float32), any
            strides; copied only if the last stride is not 1.
        key: [B, Hk, Wk, heads_k, dim], in query's dtype. heads_k divides heads: a head of the keys serves heads /
            heads_k adjacent heads of the queries (grouped-query, multi-query attention), and is not repeated in memory.
        value: [B, Hk, Wk, heads_v, dim_v], likewise; heads_v and dim_v may differ from key's.
        kernel_size: K or (Kh, Kw), at least 1; may be even: then half of the window lies before the query, which is the
            first of the other half.
        dilation: d or (d_y, d_x). kernel_size x dilation must fit into Hk x Wk.
        stride: s or (s_y, s_x), at most kernel_size.
        is_causal: whether a query attends only to positions up to its own along an axis; one bool or two.
        rpb: relative position bias [heads, 2 Kh - 1, 2 Kw - 1] or None; any dtype, added in float32 (float64).
        scale: factor of the scores; None: dim ** -0.5. 0.0 means zero.
        mean_heads: whether to return the mean over the heads, of values that all heads share (heads_v = 1): the
            weights are averaged, and multiplied by the values once.
        key_padding_mask: [B, Hk, Wk] bool or None: True for keys that no query attends to, as in a batch of maps of
            different sizes. Their values must be finite. A query without any key gets zeros and an lse of -inf. With a
            mask, query and key are copied with one more channel.
        additional_keys, additional_values: [B, L, heads_k, dim] and [B, L, heads_v, dim_v], or None: keys and values
            that every query attends to, besides its window, without a bias. Not with mean_heads.
        return_lse: whether to return lse too.
        backend: "reference", "cpu", "triton", "cuda" (C++, half precision); "natten" runs NATTEN's kernels,
            where installed, for comparisons (no rpb, no gradient through lse); None: the first in the table that can
            run (see `inr_kernels.explain`).

    Returns:
        out [B, H, W, heads, dim_v], with mean_heads [B, H, W, dim_v], in query's dtype (autocast's, under autocast);
        with return_lse (out, lse), lse [B, H, W, heads] in float32 (float64 for float64), a natural logarithm.

    Gradients reach query, key, value and rpb, through out and lse; only those that are needed are computed. They are
    deterministic, without atomics: every key gathers from the queries that attend to it. Only the inputs and lse are
    saved for them. Second derivatives need `backend="reference"`; torch.func and forward-mode differentiation use it.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message gives the reason.

    Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023; Hassani and Shi, Dilated Neighborhood
    Attention Transformer, 2022; stride and causal axes: Hassani et al., Generalized Neighborhood Attention, 2025.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 12, 9, 2, 16)
        >>> neighborhood_attention_2d(q, k, v, 5, dilation=(2, 1)).shape
        torch.Size([1, 12, 9, 2, 16])
    """
    options = kernel_size, dilation, stride, is_causal, rpb, scale, mean_heads
    return _run(
        2, [query, key, value], *options, key_padding_mask, additional_keys, additional_values, return_lse, backend
    )


def neighborhood_attention_2d_packed(
    qkv: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes `neighborhood_attention_2d` of query, key and value in one tensor, as a Linear layer returns them.

    See there for formula, errors and gradients. Nothing is copied: the kernels read qkv, and write its gradient, by
    strides.

    Args:
        qkv: [B, H, W, 3, heads, dim].
        kernel_size, dilation, stride, is_causal, rpb, scale, return_lse, backend: see there.

    Returns:
        [B, H, W, heads, dim], or (out, lse).

    Example:
        >>> import torch
        >>> qkv = torch.nn.Linear(32, 96)(torch.randn(1, 12, 9, 32)).view(1, 12, 9, 3, 2, 16)
        >>> neighborhood_attention_2d_packed(qkv, 7).shape
        torch.Size([1, 12, 9, 2, 16])
    """
    return attend_packed(2, qkv, kernel_size, dilation, stride, is_causal, rpb, scale, return_lse, backend)


def neighborhood_attention_1d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: torch.Tensor | None = None,
    scale: float | None = None,
    mean_heads: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes `neighborhood_attention_2d` on sequences: every token attends to a window of tokens around it.

    See there for the window rule, forms, errors and gradients; nothing is copied.

    Args:
        query: [B, L, heads, dim].
        key, value: [B, Lk, heads_k, dim] and [B, Lk, heads_v, dim_v]; Lk divides L.
        kernel_size, dilation, stride, is_causal: integers and a bool, or tuples of one.
        rpb: relative position bias [heads, 2 kernel_size - 1] or None.
        key_padding_mask: [B, Lk] bool or None.
        scale, mean_heads, additional_keys, additional_values, return_lse, backend: see there.

    Returns:
        out [B, L, heads, dim_v], with mean_heads [B, L, dim_v]; with return_lse (out, lse), lse [B, L, heads].

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 30, 2, 16)
        >>> neighborhood_attention_1d(q, k, v, 5, dilation=3, is_causal=True).shape
        torch.Size([1, 30, 2, 16])
    """
    options = kernel_size, dilation, stride, is_causal, rpb, scale, mean_heads
    return _run(
        1, [query, key, value], *options, key_padding_mask, additional_keys, additional_values, return_lse, backend
    )


def neighborhood_attention_3d(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: torch.Tensor | None = None,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes `neighborhood_attention_2d` on volumes or videos, with windows of Kd x Kh x Kw tokens.

    See there for the window rule, which holds on each axis, errors and gradients. Queries and keys have the same size.

    Args:
        query: [B, D, H, W, heads, dim].
        key, value: [B, D, H, W, heads_k, dim] and [B, D, H, W, heads_v, dim_v].
        kernel_size, dilation, stride, is_causal: one value or three.
        rpb: relative position bias [heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1] or None.
        key_padding_mask: [B, D, H, W] bool or None.
        scale, additional_keys, additional_values, return_lse, backend: see there.

    Returns:
        out [B, D, H, W, heads, dim_v]; with return_lse (out, lse), lse [B, D, H, W, heads].

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 6, 9, 8, 2, 16)
        >>> neighborhood_attention_3d(q, k, v, (3, 5, 5), is_causal=(True, False, False)).shape
        torch.Size([1, 6, 9, 8, 2, 16])
    """
    options = kernel_size, dilation, stride, is_causal, rpb, scale, False
    return _run(
        3, [query, key, value], *options, key_padding_mask, additional_keys, additional_values, return_lse, backend
    )


def merge_attentions(
    outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the attention to the union of sets of keys, of the attention of the same queries to each.

        lse = log sum_n exp(lse_n),    out = sum_n exp(lse_n - lse) out_n

    Args:
        outputs: tensors [..., heads, dim] of one shape and dtype.
        lses: the logarithms of the sums of exponentials of each one's scores, [..., heads], float32 (float64 for
            float64), as the functions of this op return them with return_lse. -inf: it had no key.

    Returns:
        out [..., heads, dim], lse [..., heads]; zeros and -inf for a query without any key. Differentiable with
        respect to outputs and lses, any number of times.

    Example:
        >>> import torch
        >>> outputs, lses = torch.randn(2, 1, 9, 8, 2, 16), torch.randn(2, 1, 9, 8, 2)
        >>> merge_attentions(list(outputs), list(lses))[0].shape
        torch.Size([1, 9, 8, 2, 16])
    """
    require(len(outputs) == len(lses) > 0, "lses", f"have as many tensors as outputs, {len(outputs)}", len(lses))
    for out, lse in zip(outputs, lses, strict=True):
        require_tensor(out, "outputs")
        require_match(out, "outputs", outputs[0].shape, outputs[0].dtype, outputs[0].device)
        require_match(lse, "lses", out.shape[:-1], exact(out.dtype), out.device)
    stacked = torch.stack(list(lses))
    largest = stacked.detach().amax(0)
    empty = largest == -math.inf
    weights = (stacked - largest.masked_fill(empty, 0)).exp()
    total = weights.sum(0).masked_fill(empty, 1)
    weights = weights / total
    out = sum(weight.unsqueeze(-1) * out for weight, out in zip(weights, outputs, strict=True))
    return out.to(outputs[0].dtype), (total.log() + largest).masked_fill(empty, -math.inf)


def attend_packed(
    rank: int,
    qkv: torch.Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    rpb: torch.Tensor | None,
    scale: float | None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The attention of qkv [B, ..., 3, heads, dim] of `rank` axes; see `neighborhood_attention_2d_packed`."""
    check_tensors([qkv], rank)
    out, lse = _attend(rank, [qkv], kernel_size, dilation, stride, is_causal, rpb, scale, False, backend)
    return (out, lse) if return_lse else out


def _run(
    rank, qkv, kernel_size, dilation, stride, is_causal, rpb, scale, mean_heads, mask, more_keys, more_values,
    return_lse, backend,
):  # fmt: skip
    """The public functions for tensors of `rank` axes."""
    check_tensors(qkv, rank)
    query = qkv[0]
    if scale is None:
        scale = int(query.shape[-1]) ** -0.5  # torch.jit.trace has sizes in tensors
    options = kernel_size, dilation, stride, is_causal, rpb
    if mask is None:
        out, lse = _attend(rank, qkv, *options, scale, mean_heads, backend)
    else:
        out, lse = _attend_masked(rank, qkv, mask, *options, scale, mean_heads, backend)
    if more_keys is not None or more_values is not None:
        require(not mean_heads, "additional_keys", "be None with mean_heads", type(more_keys).__name__)
        extra = _attend_to_all(query, more_keys, more_values, scale, backend)
        out, lse = merge_attentions([out, extra[0].view(out.shape)], [lse, extra[1].view(lse.shape)])
    return (out, lse) if return_lse else out


def _attend_masked(rank, qkv, mask, kernel_size, dilation, stride, is_causal, rpb, scale, mean_heads, backend):
    """`_attend` without the keys under the mask: one more channel lowers their scores beyond any other."""
    query, key, value = apply_autocast(*qkv)
    require_tensor(mask, "key_padding_mask", dims=(rank + 1,), like=query, integers=True)
    require(mask.dtype == torch.bool, "key_padding_mask", "have dtype torch.bool", mask.dtype)
    require(mask.shape == key.shape[:-2], "key_padding_mask", f"have shape {list(key.shape[:-2])}", shape(mask))
    if abs(scale) < 2**-8:  # its inverse would not fit float16
        query, scale = query * scale, 1.0
    query = torch.cat([query, query.new_full((*query.shape[:-1], 1), 1 / scale)], -1)
    lowered = mask[..., None, None].expand(*key.shape[:-1], 1) * key.new_tensor(-LOWERED)
    qkv = [query, torch.cat([key, lowered], -1), value]
    out, lse = _attend(rank, qkv, kernel_size, dilation, stride, is_causal, rpb, scale, mean_heads, backend)
    empty = lse < -LOWERED / 2  # all keys of the window are under the mask
    if not mean_heads:
        out = out.masked_fill(empty.unsqueeze(-1), 0)
    else:
        out = out.masked_fill(empty.all(-1, keepdim=True), 0)
    return out, lse.masked_fill(empty, -math.inf)


def _attend_to_all(query, keys, values, scale, backend):
    """The attention of query [B, ..., heads, dim] to keys and values [B, L, heads, dim]: [B, N, heads, dim_v]."""
    for tensor, name in ((keys, "additional_keys"), (values, "additional_values")):
        require_tensor(tensor, name, dims=(4,), like=query)
    fits = keys.shape[0] == query.shape[0] and keys.shape[3] == query.shape[-1] and query.shape[-2] % keys.shape[2] == 0
    require(fits, "additional_keys", f"fit query {shape(query)}, as [B, L, heads, dim]", shape(keys))
    fits = values.shape[:2] == keys.shape[:2] and query.shape[-2] % values.shape[2] == 0
    require(fits, "additional_values", f"fit additional_keys {shape(keys)}", shape(values))
    length = keys.shape[1]
    require(length > 0, "additional_keys", "have at least one key", shape(keys))
    qkv = [query.flatten(1, -3), keys, values]
    return _attend(1, qkv, length, 1, 1, False, None, scale, False, backend)


def _attend(rank, qkv, kernel_size, dilation, stride, is_causal, rpb, scale, mean_heads, backend):
    """Checks, applies autocast, and runs: out, lse. qkv: one packed tensor or three, which were checked."""
    kernel_size, dilation, stride = (
        check_axes(value, name, rank)
        for value, name in ((kernel_size, "kernel_size"), (dilation, "dilation"), (stride, "stride"))
    )
    if rpb is not None:
        require_tensor(rpb, "rpb", dims=(rank + 1,), like=qkv[0])
    if scale is None:
        scale = int(qkv[0].shape[-1]) ** -0.5  # torch.jit.trace has sizes in tensors
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    require(number, "scale", "be a number or None", repr(scale))
    require(isinstance(mean_heads, bool), "mean_heads", "be a bool", repr(mean_heads))
    requested = dispatch.requested_backend(backend)
    requested = dispatch.reference_if_transformed(requested, *qkv, *([] if rpb is None else [rpb]))
    qkv = apply_autocast(*qkv)
    rpb = None if rpb is None else rpb.to(exact(qkv[0].dtype))
    is_causal = [int(value) for value in check_causal(is_causal, rank)]
    arguments = Arguments(qkv, rpb, kernel_size, dilation, stride, is_causal, float(scale), mean_heads)
    with without_autocast(qkv[0]):  # already applied
        if requested in ("reference", "natten"):
            arguments.check()  # the op checks its arguments itself
            out, lse = (op.run_natten if requested == "natten" else op.run_reference)(arguments)
        else:
            out, lse = op.neighborhood_attention(*arguments, requested)
    return out.squeeze(-2) if mean_heads else out, lse
