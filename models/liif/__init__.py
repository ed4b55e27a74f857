"""LIIF: an EDSR encoder with a local implicit decoder."""

from .edsr import EDSR
from .network import LIIF, SMALL, LIIFConfig

__all__ = ["EDSR", "LIIF", "SMALL", "LIIFConfig"]
