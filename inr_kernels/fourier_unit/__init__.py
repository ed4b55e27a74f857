"""The Fourier unit, and the fast Fourier convolution (FFC) of LaMa that contains it."""

from .functional import conv2d, conv3x3, fourier_unit
from .module import FFC, FFC_BN_ACT, FFCResnetBlock, FourierUnit, FusedSequential, SpectralTransform, frozen

__all__ = [
    "FFC",
    "FFC_BN_ACT",
    "FFCResnetBlock",
    "FourierUnit",
    "FusedSequential",
    "SpectralTransform",
    "conv2d",
    "conv3x3",
    "fourier_unit",
    "frozen",
]
