"""LaMa's fast Fourier convolutions by the names that LaMa gives them; they live beside their kernel."""

import torch
from torch import nn

from inr_kernels.fourier_unit import FFC, FFC_BN_ACT, FFCResnetBlock, FourierUnit, SpectralTransform

__all__ = ["FFC", "FFC_BN_ACT", "ConcatTupleLayer", "FFCResnetBlock", "FourierUnit", "SpectralTransform"]


class ConcatTupleLayer(nn.Module):
    """(local, global) -> one tensor, local channels first."""

    def forward(self, x):
        """A global part that is no tensor is left out."""
        return torch.cat([part for part in x if isinstance(part, torch.Tensor)], 1)
