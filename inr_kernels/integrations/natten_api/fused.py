"""NATTEN's fused functions, by the signatures of version 0.21, on this package's ops."""

from collections.abc import Sequence
from typing import Any

import torch

from inr_kernels import neighborhood_attention as ops
from inr_kernels._core.checks import require

# Keywords, also of attention_kwargs, that choose only how NATTEN computes.
TUNING = {"q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_tile_shape", "backward_kv_splits"}
TUNING |= {"q_tile_size", "kv_tile_size", "backward_q_tile_size", "backward_kv_tile_size"}
TUNING |= {"backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule", "torch_compile"}
BACKENDS = {None, *(f"{name}-{op}" for name in ("cutlass", "hopper", "blackwell", "flex") for op in ("fna", "fmha"))}

Sizes = int | Sequence[int]
Flags = bool | Sequence[bool] | None
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def neighborhood_attention_generic(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    *,
    rpb: torch.Tensor | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Result:
    """Computes neighborhood attention of one, two or three axes; `na1d`, `na2d` and `na3d` are this function.

    Args:
        query, key, value: [B, ..., heads, dim], as in `neighborhood_attention_1d`, `_2d` and `_3d`.
        kernel_size, stride, dilation, is_causal: one value, or one for each axis. None: not causal.
        scale: factor of the scores. None and, as in NATTEN, 0: dim ** -0.5.
        additional_keys, additional_values: [B, L, heads, dim]: attended to by every query.
        backend: a backend of NATTEN, which is ignored, or one of this package.
        rpb: relative position bias, as in NATTEN 0.17.
        attention_kwargs, tuning: choose NATTEN's kernels, and are ignored; another name raises.

    Returns:
        out [B, ..., heads, dim_v], with return_lse (out, lse).

    Raises:
        TypeError: a keyword that NATTEN does not have.
        ValueError: see `neighborhood_attention_2d`.
    """
    check_tuning("neighborhood attention", tuning)
    check_tuning("attention_kwargs", {k: v for k, v in (attention_kwargs or {}).items() if k != "backend"})
    rank = query.dim() - 3
    require(rank in _FUNCTIONS, "query", "have four to six dimensions", list(query.shape))
    return _FUNCTIONS[rank](
        query,
        key,
        value,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=False if is_causal is None else is_causal,
        scale=scale or None,
        additional_keys=additional_keys,
        additional_values=additional_values,
        rpb=rpb,
        return_lse=return_lse,
        backend=None if backend in BACKENDS else backend,
    )


_FUNCTIONS: dict[int, Any] = {
    1: ops.neighborhood_attention_1d,
    2: ops.neighborhood_attention_2d,
    3: ops.neighborhood_attention_3d,
}


def na1d(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel_size: Sizes, *args: Any, **kw: Any
) -> Result:
    """`neighborhood_attention_generic` of [B, L, heads, dim]."""
    return _of_axes(1, query, key, value, kernel_size, *args, **kw)


def na2d(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel_size: Sizes, *args: Any, **kw: Any
) -> Result:
    """`neighborhood_attention_generic` of [B, H, W, heads, dim]."""
    return _of_axes(2, query, key, value, kernel_size, *args, **kw)


def na3d(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel_size: Sizes, *args: Any, **kw: Any
) -> Result:
    """`neighborhood_attention_generic` of [B, D, H, W, heads, dim]."""
    return _of_axes(3, query, key, value, kernel_size, *args, **kw)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    backend: str | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Result:
    """Computes the attention of query [B, L, heads, dim] to all keys, or with is_causal to those up to its position.

    Sequences of different lengths in one tensor (`seqlens_Q`, `cumulative_seqlen_Q`, ...) are not supported.

    Raises:
        TypeError: a keyword that NATTEN does not have, or of such sequences.
        ValueError: see `neighborhood_attention_1d`.
    """
    check_tuning("attention", tuning)
    backend = None if backend in BACKENDS else backend
    options: dict[str, Any] = {"scale": scale or None, "return_lse": return_lse, "backend": backend}
    shared = min(query.shape[1], key.shape[1])
    if not is_causal or query.shape[1] == shared == key.shape[1]:
        return ops.neighborhood_attention_1d(query, key, value, key.shape[1], is_causal=is_causal, **options)
    seen = query[:, :shared], key[:, :shared], value[:, :shared]
    first: Any = ops.neighborhood_attention_1d(*seen, shared, is_causal=True, **options)
    if query.shape[1] == shared:
        return first
    rest: Any = ops.neighborhood_attention_1d(query[:, shared:], key, value, shared, **options)  # they see every key
    if return_lse:
        return torch.cat([first[0], rest[0]], 1), torch.cat([first[1], rest[1]], 1)
    return torch.cat([first, rest], 1)


def merge_attentions(
    outputs: list[torch.Tensor],
    lse_tensors: list[torch.Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges attentions of the same queries to several sets of keys; see `inr_kernels.merge_attentions`.

    torch_compile and use_autograd_fix are ignored: gradients are exact.
    """
    return ops.merge_attentions(outputs, lse_tensors)


def check_tuning(function: str, tuning: dict[str, Any]) -> None:
    """Raises TypeError for a keyword that does not only choose a kernel."""
    for name in tuning:
        if name not in TUNING:
            raise TypeError(f"{function} got an unexpected keyword argument {name!r}")


def _of_axes(rank, query, *args, **options):
    if query.dim() != rank + 3:
        require(False, "query", f"have {rank + 3} dimensions", list(query.shape))
    return neighborhood_attention_generic(query, *args, **options)
