"""IN²: implicit neural inpainting."""

from .network import IN2, SMALL, IN2Config, IN2Features
from .pyramid import ImplicitPyramidDecoder, ImplicitUpsample

__all__ = ["IN2", "SMALL", "IN2Config", "IN2Features", "ImplicitPyramidDecoder", "ImplicitUpsample"]
