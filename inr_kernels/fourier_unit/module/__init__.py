"""FourierUnit and the fast Fourier convolutions around it: LaMa's names, arguments, keys and tuples.

A feature map is a pair (local, global) of [B, C, H, W]; a part that is absent is the integer 0. All forwards read only
attributes that LaMa's own modules have, so that they serve those too (inr_kernels/integrations/lama.py).
"""

from .ffc import FFC, FFC_BN_ACT, FFCResnetBlock
from .spectral import FourierUnit, SpectralTransform

__all__ = ["FFC", "FFC_BN_ACT", "FFCResnetBlock", "FourierUnit", "SpectralTransform"]
