"""Neighborhood attention in plain PyTorch: the definition, for any dtype, differentiable any number of times."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Axis(NamedTuple):
    """The options of one axis of the map, whose size is `length`."""

    length: int
    kernel_size: int
    dilation: int
    stride: int
    is_causal: bool


def window(
    length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """NATTEN's rule on one axis: the keys in the window of each query.

    Returns:
        keys: [length, kernel_size], the position of every key of every query.
        seen: the same shape, False for the taps that a causal window excludes.
    """
    query = torch.arange(length, dtype=torch.long, device=device)
    residue, i = query % dilation, query // dilation
    n = (length - residue + dilation - 1) // dilation  # tokens of the query's residue class
    group = i // stride * stride
    if is_causal:
        start = (torch.minimum(group + stride - 1, n - 1) - kernel_size + 1).clamp(min=0)
        end = i + 1
    else:
        lead = torch.minimum(group + stride // 2, n - 1)
        start = torch.minimum((lead - kernel_size // 2).clamp(min=0), n - kernel_size)
        end = start + kernel_size
    taps = start[:, None] + torch.arange(kernel_size, dtype=torch.long, device=device)
    seen = taps < end[:, None]
    return residue[:, None] + dilation * torch.where(seen, taps, start[:, None]), seen


def neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpb: torch.Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key, value [B, H, W, heads, dim], rpb [heads, 2 Kh - 1, 2 Kw - 1] or None -> out, lse [B, H, W, heads].

    Scores and lse are at least float32. The arguments are the op's (op.py).
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    y, x = map(Axis, query.shape[1:3], kernel_size, dilation, stride, map(bool, is_causal))
    (rows, rows_seen), (cols, cols_seen) = (window(*axis, query.device) for axis in (y, x))
    query = query * scale
    taps = list(itertools.product(*map(range, kernel_size)))

    def neighbour(tensor, i, j):
        return tensor[:, rows[:, i, None], cols[None, :, j]]

    def steps(keys, axis):
        """The offsets of the keys from their queries in units of the dilation, plus kernel_size - 1."""
        return (
            (keys - torch.arange(axis.length, dtype=keys.dtype, device=keys.device)) // axis.dilation
            + axis.kernel_size
            - 1
        )

    scores = []
    for i, j in taps:
        score = (query * neighbour(key, i, j)).sum(-1).to(exact)
        if rpb is not None:
            bias = rpb[:, steps(rows[:, i], y)[:, None], steps(cols[:, j], x)]
            score = score + bias.permute(1, 2, 0).to(exact)
        seen = rows_seen[:, i, None] & cols_seen[None, :, j]
        scores.append(score.masked_fill(~seen[..., None], -math.inf))
    stacked = torch.stack(scores, -1)
    weights = stacked.softmax(-1).to(query.dtype)
    out = torch.zeros_like(value)
    for t, (i, j) in enumerate(taps):
        out = out + weights[..., t, None] * neighbour(value, i, j)
    return out, stacked.logsumexp(-1)
