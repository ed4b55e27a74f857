"""Neighborhood attention in plain PyTorch: the definition, for any dtype, differentiable any number of times."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .arguments import window


class Axis(NamedTuple):
    """The options of one axis, of `queries` positions and `keys`."""

    queries: int
    keys: int
    kernel_size: int
    dilation: int
    stride: int
    is_causal: bool

    def positions(self, device: torch.device) -> torch.Tensor:
        """[queries]: the position of each query among the keys. Several queries, the ratio, have the same."""
        ratio = -(-self.queries // self.keys)
        return torch.arange(self.queries, dtype=torch.long, device=device) // ratio

    def window(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys of each query, and which of them it sees: both [queries, kernel_size]; see `window`."""
        options = self.kernel_size, self.dilation, self.stride, self.is_causal
        at = self.positions(device)
        keys, seen = window(self.keys, *options, device)
        return keys[at], seen[at]

    def steps(self, keys: torch.Tensor) -> torch.Tensor:
        """The offsets of keys [queries] from their queries in units of the dilation, plus kernel_size - 1."""
        return (keys - self.positions(keys.device)) // self.dilation + self.kernel_size - 1


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
    mean_heads: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, ..., heads, dim], key, value, rpb -> out [B, ..., heads, dim_v], lse [B, ..., heads].

    Of one to three axes. Scores and lse are at least float32. The arguments are the op's (op.py).
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    device, heads = query.device, query.shape[-2]
    options = kernel_size, dilation, stride, map(bool, is_causal)
    axes = [Axis(*values) for values in zip(query.shape[1:-2], key.shape[1:-2], *options, strict=True)]
    windows = [axis.window(device) for axis in axes]
    query = query * scale
    taps = list(itertools.product(*map(range, kernel_size)))

    def grid(values):
        """One tensor [length] per axis, each broadcasting to the shape of the map."""
        return [v.view([-1 if i == j else 1 for j in range(len(axes))]) for i, v in enumerate(values)]

    def at(tensor, indices):
        """The elements of tensor [.., *map] at indices of the map's axes, behind its first."""
        index = slice(None), *grid(indices)
        return tensor[index]

    def keys_at(tap):
        return [keys[:, t] for (keys, _), t in zip(windows, tap, strict=True)]

    def neighbour(tensor, tap, heads=heads):
        """The key or the value of every query at one tap, repeated for every head."""
        near = at(tensor, keys_at(tap))
        return near if heads == near.shape[-2] else near.repeat_interleave(heads // near.shape[-2], -2)

    scores = []
    for tap in taps:
        score = (query * neighbour(key, tap)).sum(-1).to(exact)
        if rpb is not None:
            steps = [axis.steps(keys) for axis, keys in zip(axes, keys_at(tap), strict=True)]
            score = score + at(rpb, steps).movedim(0, -1).to(exact)
        seen = functools.reduce(torch.logical_and, grid(seen[:, t] for (_, seen), t in zip(windows, tap, strict=True)))
        scores.append(score.masked_fill(~seen[..., None], -math.inf))
    stacked = torch.stack(scores, -1)
    weights = stacked.softmax(-1)
    weights = (weights.mean(-2, keepdim=True) if mean_heads else weights).to(query.dtype)
    out = value.new_zeros(*weights.shape[:-1], value.shape[-1])
    for t, tap in enumerate(taps):
        out = out + weights[..., t, None] * neighbour(value, tap, weights.shape[-2])
    return out, stacked.logsumexp(-1)
