"""LaMa: inpainting with fast Fourier convolutions."""

from .network import LaMa, LaMaConfig

__all__ = ["LaMa", "LaMaConfig"]
