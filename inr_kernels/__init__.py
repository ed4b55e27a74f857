"""Fused, exact kernels for local implicit image decoding, on CPUs and GPUs."""

from ._core.dispatch import backend, explain
from ._core.native import release_memory
from .elementwise_filter import ElementwiseFilter, elementwise_filter, pixelwise_reconstruct
from .fourier_unit import FourierUnit, fourier_unit
from .integrations import accelerate
from .local_implicit import LocalImplicitDecoder, local_implicit_decode
from .neighborhood_attention import NeighborhoodAttention2D, neighborhood_attention_2d, neighborhood_attention_2d_packed
from .unmask_attention import UnmaskAttention, unmask_attention

__version__ = "0.1.0"
__all__ = [
    "ElementwiseFilter",
    "FourierUnit",
    "LocalImplicitDecoder",
    "NeighborhoodAttention2D",
    "UnmaskAttention",
    "__version__",
    "accelerate",
    "backend",
    "elementwise_filter",
    "explain",
    "fourier_unit",
    "local_implicit_decode",
    "neighborhood_attention_2d",
    "neighborhood_attention_2d_packed",
    "pixelwise_reconstruct",
    "release_memory",
    "unmask_attention",
]
