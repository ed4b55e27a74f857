"""UnmaskAttention: unmask attention as a layer without weights."""

from typing import Any

import torch
from torch import nn

from .functional import unmask_attention


class UnmaskAttention(nn.Module):
    """Applies `unmask_attention`, e = softmax(((1 - m) * f) fᵀ * scale) f: `e = layer(feat, mask)`.

    Shapes, dtypes and errors are those of the function. The layer has no weights.

    Args:
        scale: factor of the scores; None: 1 / sqrt(C).
        mask_keys: whether masked pixels (holes) are excluded as keys, too.
        backend: the requested backend, as in `unmask_attention`.

    Source: the attention of DEAR (SuperInpaint: Learning Detail-Enhanced Attentional Implicit Representation for
    Super-resolutional Image Inpainting, Zhang, Guo et al., 2023, eq. 6-7).

    Example:
        >>> import torch
        >>> UnmaskAttention()(torch.randn(1, 8, 5, 7), torch.zeros(1, 1, 5, 7)).shape
        torch.Size([1, 8, 5, 7])
    """

    def __init__(self, *, scale: float | None = None, mask_keys: bool = False, backend: str | None = None):
        super().__init__()
        self.options: dict[str, Any] = {"scale": scale, "mask_keys": mask_keys, "backend": backend}

    def forward(self, feat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """feat [B, C, H, W], mask [B, 1, H, W] -> [B, C, H, W]."""
        return unmask_attention(feat, mask, **self.options)

    def extra_repr(self) -> str:
        """The options, for print."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
