"""The public functions of neighborhood attention: documentation, argument checks, autocast."""

from collections.abc import Sequence
from typing import Any

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import apply_autocast, require, require_tensor, result_dtype, without_autocast

from . import op
from .arguments import Arguments, Facts, check_causal, check_pair, check_tensors, exact, shape_facts


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
    return shape_facts(query, key, value, rpb is not None, scale, mean_heads, result_dtype(query))


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
        return_lse: whether to return lse too.
        backend: "reference", "cpu", "triton"; "natten" runs NATTEN's kernels, where installed, for comparisons (no
            rpb, no gradient through lse); None: the first in the table that can run (see `inr_kernels.explain`).

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
    qkv = [query, key, value]
    return _attend(qkv, kernel_size, dilation, stride, is_causal, rpb, scale, mean_heads, return_lse, backend)


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
    return _attend([qkv], kernel_size, dilation, stride, is_causal, rpb, scale, False, return_lse, backend)


def _attend(qkv, kernel_size, dilation, stride, is_causal, rpb, scale, mean_heads, return_lse, backend):
    """Checks, applies autocast, and runs. qkv: one packed tensor or three."""
    check_tensors(qkv)
    kernel_size, dilation, stride = (
        check_pair(value, name)
        for value, name in ((kernel_size, "kernel_size"), (dilation, "dilation"), (stride, "stride"))
    )
    if rpb is not None:
        require_tensor(rpb, "rpb", dims=(3,), like=qkv[0])
    if scale is None:
        scale = int(qkv[0].shape[-1]) ** -0.5  # torch.jit.trace has sizes in tensors
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    require(number, "scale", "be a number or None", repr(scale))
    require(isinstance(mean_heads, bool), "mean_heads", "be a bool", repr(mean_heads))
    requested = dispatch.requested_backend(backend)
    requested = dispatch.reference_if_transformed(requested, *qkv, *([] if rpb is None else [rpb]))
    qkv = apply_autocast(*qkv)
    rpb = None if rpb is None else rpb.to(exact(qkv[0].dtype))
    is_causal = [int(value) for value in check_causal(is_causal)]
    arguments = Arguments(qkv, rpb, kernel_size, dilation, stride, is_causal, float(scale), mean_heads)
    with without_autocast(qkv[0]):  # already applied
        if requested in ("reference", "natten"):
            arguments.check()  # the op checks its arguments itself
            out, lse = (op.run_natten if requested == "natten" else op.run_reference)(arguments)
        else:
            out, lse = op.neighborhood_attention(*arguments, requested)
    out = out.squeeze(3) if mean_heads else out
    return (out, lse) if return_lse else out
