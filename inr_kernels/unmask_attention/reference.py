"""Unmask attention in plain PyTorch: the definition, for any dtype, differentiable any number of times."""

import torch


def unmask_attention(
    feat: torch.Tensor, weight: torch.Tensor, scale: float, mask_keys: bool, rows: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """feat [B, C, N], weight [B, N] -> out [B, C, n], softmax [B, 2, n] for the n tokens of `rows`.

    The arguments are the op's (op.py). softmax: the maximum and the sum of each row's exponentials.
    """
    query, keys, share = weight[:, rows, None].to(feat.dtype) * feat.mT[:, rows], feat, torch.ones_like(weight)
    if mask_keys:
        keys, share = torch.where(weight[:, None] > 0, feat, 0), weight
    scores = scale * query @ keys
    if mask_keys:
        some = (weight > 0).any(1)[:, None, None]  # an image without keys outputs zeros
        key = torch.where(weight > 0, weight, 1).log().masked_fill(weight <= 0, -torch.inf)
        scores = torch.where(some, scores + key[:, None].to(feat.dtype), 0)
    out = scores.softmax(2) @ keys.mT
    # 0 * NaN is NaN: a hole gets the mean, as from the kernels, which do not compute its scores.
    mean = (keys * (share / share.sum(1, keepdim=True)).to(feat.dtype)[:, None]).sum(2)[:, None]
    out = torch.where((weight[:, rows, None] == 0) & out.isnan(), mean, out)
    if mask_keys:
        out = torch.where(some, out, 0)
    max_logit = scores.amax(2)
    total = (scores - max_logit[:, :, None]).exp().sum(2)
    max_logit = max_logit.masked_fill(weight[:, rows] == 0, torch.inf)  # as the kernels: such a token is no query
    return out.mT, torch.stack((max_logit, total), 1).to(weight.dtype)
