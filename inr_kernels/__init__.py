"""Fused, exact kernels for local implicit image decoding, on CPUs and GPUs."""

from ._core.dispatch import backend, explain
from .elementwise_filter import ElementwiseFilter, elementwise_filter, pixelwise_reconstruct
from .integrations import accelerate
from .local_implicit import LocalImplicitDecoder, local_implicit_decode
from .unmask_attention import UnmaskAttention, unmask_attention

__version__ = "0.1.0"
__all__ = [
    "ElementwiseFilter",
    "LocalImplicitDecoder",
    "UnmaskAttention",
    "__version__",
    "accelerate",
    "backend",
    "elementwise_filter",
    "explain",
    "local_implicit_decode",
    "pixelwise_reconstruct",
    "unmask_attention",
]
