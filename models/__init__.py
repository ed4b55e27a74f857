"""Networks, one file each."""

from .dear import DEAR, DEARConfig
from .in2 import IN2, ImplicitPyramidDecoder, ImplicitUpsample, IN2Config
from .lama import LaMa, LaMaConfig
from .liif import EDSR, LIIF, LIIFConfig

__all__ = [
    "DEAR",
    "EDSR",
    "IN2",
    "LIIF",
    "DEARConfig",
    "IN2Config",
    "ImplicitPyramidDecoder",
    "ImplicitUpsample",
    "LIIFConfig",
    "LaMa",
    "LaMaConfig",
]
