"""Networks, one file each."""

from .edsr import EDSR
from .lama import LaMa, LaMaConfig
from .liif import LIIF, LIIFConfig

__all__ = ["EDSR", "LIIF", "LIIFConfig", "LaMa", "LaMaConfig"]
