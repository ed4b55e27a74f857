"""Networks, one file each."""

from .edsr import EDSR
from .liif import LIIF, LIIFConfig

__all__ = ["EDSR", "LIIF", "LIIFConfig"]
