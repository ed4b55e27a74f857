"""LaMa's fast Fourier convolutions under LaMa's names; `inr_kernels.fourier_unit` implements them."""

import torch
from torch import nn

from inr_kernels.fourier_unit import FFC, FFC_BN_ACT, FFCResnetBlock, FourierUnit, SpectralTransform

__all__ = ["FFC", "FFC_BN_ACT", "ConcatTupleLayer", "FFCResnetBlock", "FourierUnit", "SpectralTransform"]


class ConcatTupleLayer(nn.Module):
    """Concatenates (local, global) along the channels."""

    def forward(self, x: tuple[torch.Tensor | int, ...]) -> torch.Tensor:
        """([B, C, H, W], [B, D, H, W]) -> [B, C + D, H, W]; a part that is the number 0 is left out."""
        return torch.cat([part for part in x if isinstance(part, torch.Tensor)], 1)
