"""Element-wise filtering in plain PyTorch: the definition, for any dtype, differentiable any number of times."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .arguments import reach


def weights(kernel: torch.Tensor, groups: int, normalize: str, log_window: torch.Tensor | None) -> torch.Tensor:
    """kernel [B, groups K², Ho, Wo], log_window [kh, kw] or None -> the taps' weights [B, groups, 1, K², Ho, Wo]."""
    logits = kernel.unflatten(1, (groups, 1, -1))
    if log_window is not None:
        logits = logits + log_window.to(kernel.dtype).view(-1, 1, 1)
    if normalize == "taps":
        return logits.softmax(3)
    if normalize == "all":
        return logits.flatten(1, 3).softmax(1).view_as(logits)
    return logits


def elementwise_filter(
    x: torch.Tensor,
    kernel: torch.Tensor,
    kernel_size: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    stride: int,
    upscale: int,
    padding: str,
    normalize: str,
    alpha: float,
    beta: float,
    gamma: float,
    log_window: torch.Tensor | None,
) -> torch.Tensor:
    """x [B, C, H, W], kernel [B, groups K², Ho, Wo] -> [len(dilation), B, C, Ho, Wo].

    The term of a zero coefficient is omitted. The arguments are the op's (op.py).
    """
    taps = weights(kernel, groups, normalize, log_window)
    filtered = [_filter(x, taps, kernel_size, d, stride, upscale, padding, alpha, beta, gamma) for d in dilation]
    return torch.stack(filtered)


def _filter(x, taps, kernel_size, dilation, stride, upscale, padding, alpha, beta, gamma):
    if padding != "valid":
        above, left = reach(kernel_size, dilation)
        x = F.pad(x, (left, left, above, above), mode="constant" if padding == "zeros" else padding)
    x = x.unflatten(1, (taps.shape[1], -1))
    # The input pixel that the first tap of every output pixel reads, in the padded input.
    rows, cols = (torch.arange(n, dtype=torch.long, device=x.device) * stride // upscale for n in taps.shape[-2:])

    def shifted(i, j):
        return x[..., rows + i * dilation, :][..., cols + j * dilation]

    out = 0
    if alpha:
        out = alpha * shifted(kernel_size[0] // 2, kernel_size[1] // 2)
    for k in range(kernel_size[0] * kernel_size[1]) if beta or gamma else ():
        z = shifted(*divmod(k, kernel_size[1]))
        weight = (gamma * taps[:, :, :, k] if gamma else 0) + beta
        out = out + weight * z
    if not (alpha or beta or gamma):
        out = torch.zeros_like(shifted(0, 0))
    return out.flatten(1, 2)
