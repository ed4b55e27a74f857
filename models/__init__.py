"""Networks, one file each."""

from .edsr import EDSR
from .implicit_pyramid import ImplicitPyramidDecoder, ImplicitUpsample
from .in2 import IN2, IN2Config
from .lama import LaMa, LaMaConfig
from .liif import LIIF, LIIFConfig

__all__ = [
    "EDSR",
    "IN2",
    "LIIF",
    "IN2Config",
    "ImplicitPyramidDecoder",
    "ImplicitUpsample",
    "LIIFConfig",
    "LaMa",
    "LaMaConfig",
]
