"""Local implicit image decoding: LIIF's local ensemble with cell decoding, and LTE's local textures, fused."""

from .functional import local_implicit_decode, local_texture_decode, mlp
from .module import LocalImplicitDecoder, LocalTextureDecoder

__all__ = ["LocalImplicitDecoder", "LocalTextureDecoder", "local_implicit_decode", "local_texture_decode", "mlp"]
