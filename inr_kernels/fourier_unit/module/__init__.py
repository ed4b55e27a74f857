"""FourierUnit and the fast Fourier convolutions built on it, with LaMa's names, arguments, state-dict keys and tuples.

A feature map is a pair (local, global) of tensors [B, C, H, W]; an absent part is the integer 0. All forwards read only
attributes that LaMa's own modules have, so that they also run those (inr_kernels/integrations/lama.py).

Source: Suvorov et al., Resolution-robust Large Mask Inpainting with Fourier Convolutions, WACV 2022; Chi, Jiang and Mu,
Fast Fourier Convolution, NeurIPS 2020.
"""

from .blocks import FFC_BN_ACT, FFCResnetBlock, frozen
from .ffc import FFC
from .fused import FusedSequential
from .spectral import FourierUnit, SpectralTransform

__all__ = ["FFC", "FFC_BN_ACT", "FFCResnetBlock", "FourierUnit", "FusedSequential", "SpectralTransform", "frozen"]
