"""LIIF and LTE: an EDSR or RDN encoder with a local implicit or a local texture decoder."""

from .edsr import EDSR
from .lte import LTE, LTEConfig
from .network import LIIF, SMALL, LIIFConfig
from .rdn import RDN

__all__ = ["EDSR", "LIIF", "LTE", "RDN", "SMALL", "LIIFConfig", "LTEConfig"]
