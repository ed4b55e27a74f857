"""Local implicit image decoding: LIIF's local ensemble with cell decoding, fused."""

from .functional import local_implicit_decode
from .module import LocalImplicitDecoder

__all__ = ["LocalImplicitDecoder", "local_implicit_decode"]
