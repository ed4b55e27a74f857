"""Neighborhood attention in plain PyTorch: the mathematics, any dtype, any order of derivatives."""

import itertools
import math

import torch


def window(length, kernel_size, dilation, stride, is_causal, device=None):
    """NATTEN's rule on one axis: what each query sees.

    Returns:
        keys: [length, kernel_size], the position of every key of every query.
        seen: the same shape, False where a causal window is shorter.
    """
    query = torch.arange(length, device=device)
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
    taps = start[:, None] + torch.arange(kernel_size, device=device)
    seen = taps < end[:, None]
    return residue[:, None] + dilation * torch.where(seen, taps, start[:, None]), seen


def neighborhood_attention(query, key, value, rpb, kernel_size, dilation, stride, is_causal, scale):
    """query, key, value [B, H, W, heads, dim], rpb [heads, 2 Kh - 1, 2 Kw - 1] or None -> out, lse [B, H, W, heads].

    Scores and lse are at least float32. The arguments are those of the op (op.py).
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    axes = list(zip(query.shape[1:3], kernel_size, dilation, stride, is_causal, strict=True))
    (rows, rows_seen), (cols, cols_seen) = (window(*axis, query.device) for axis in axes)
    query = query * scale
    taps = list(itertools.product(*map(range, kernel_size)))

    def neighbour(tensor, i, j):
        return tensor[:, rows[:, i, None], cols[None, :, j]]

    def steps(keys, axis):
        """How many steps of the dilation the keys lie from their queries, counted from 1 - K."""
        length, side, dilation = axis[:3]
        return (keys - torch.arange(length, device=keys.device)) // dilation + side - 1

    scores = []
    for i, j in taps:
        score = (query * neighbour(key, i, j)).sum(-1).to(exact)
        if rpb is not None:
            bias = rpb[:, steps(rows[:, i], axes[0])[:, None], steps(cols[:, j], axes[1])]
            score = score + bias.permute(1, 2, 0).to(exact)
        seen = rows_seen[:, i, None] & cols_seen[None, :, j]
        scores.append(score.masked_fill(~seen[..., None], -math.inf))
    scores = torch.stack(scores, -1)
    weights = scores.softmax(-1).to(query.dtype)
    out = torch.zeros_like(value)
    for t, (i, j) in enumerate(taps):
        out = out + weights[..., t, None] * neighbour(value, i, j)
    return out, scores.logsumexp(-1)
