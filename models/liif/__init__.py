"""LIIF: an EDSR or RDN encoder with a local implicit decoder."""

from .edsr import EDSR
from .network import LIIF, SMALL, LIIFConfig
from .rdn import RDN

__all__ = ["EDSR", "LIIF", "RDN", "SMALL", "LIIFConfig"]
