"""Networks, one file each."""

from .dear import DEAR, DEARConfig
from .edsr import EDSR
from .implicit_pyramid import ImplicitPyramidDecoder, ImplicitUpsample
from .in2 import IN2, IN2Config
from .lama import LaMa, LaMaConfig
from .liif import LIIF, LIIFConfig

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
