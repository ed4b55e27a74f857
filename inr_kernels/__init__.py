"""Fused, exact kernels for local implicit image decoding, on CPUs and GPUs."""

from ._core.dispatch import backend, explain
from .integrations import accelerate
from .local_implicit import LocalImplicitDecoder, local_implicit_decode

__version__ = "0.1.0"
__all__ = ["LocalImplicitDecoder", "__version__", "accelerate", "backend", "explain", "local_implicit_decode"]
