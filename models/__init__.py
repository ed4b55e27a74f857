"""Networks, one file each."""

from .dear import DEAR, DEARConfig
from .edsr import EDSR
from .lama import LaMa, LaMaConfig
from .liif import LIIF, LIIFConfig

__all__ = ["DEAR", "EDSR", "LIIF", "DEARConfig", "LIIFConfig", "LaMa", "LaMaConfig"]
