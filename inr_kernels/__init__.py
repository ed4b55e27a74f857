"""Fused, exact kernels for local implicit image decoding, on CPUs and GPUs."""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "ElementwiseFilter",
    "FourierUnit",
    "LocalImplicitDecoder",
    "LocalTextureDecoder",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "UnmaskAttention",
    "__version__",
    "accelerate",
    "backend",
    "elementwise_filter",
    "explain",
    "fourier_unit",
    "local_implicit_decode",
    "local_texture_decode",
    "merge_attentions",
    "neighborhood_attention_1d",
    "neighborhood_attention_2d",
    "neighborhood_attention_2d_packed",
    "neighborhood_attention_3d",
    "pixelwise_reconstruct",
    "prove",
    "release_memory",
    "unmask_attention",
]


def _is_command() -> bool:
    """Whether this process is the command: `inr-kernels` or `python -m inr_kernels`."""
    started, *arguments = sys.argv or [""]
    if started == "-m":  # while `python -m` imports the package of its module
        return sys.orig_argv[-len(arguments) - 1] == __name__
    return PurePath(started).name in ("inr-kernels", "inr-kernels.exe")


# Importing the package defines all names and registers torch.ops.inr_kernels. The command alone starts without them,
# as `--help` must not take the seconds that importing torch takes: there, the first use of a name imports them all.
if "torch" in sys.modules or not _is_command():
    from ._core.dispatch import backend, explain
    from ._core.native import release_memory
    from ._core.proof import prove
    from .elementwise_filter import ElementwiseFilter, elementwise_filter, pixelwise_reconstruct
    from .fourier_unit import FourierUnit, fourier_unit
    from .integrations import accelerate
    from .local_implicit import (
        LocalImplicitDecoder,
        LocalTextureDecoder,
        local_implicit_decode,
        local_texture_decode,
    )
    from .neighborhood_attention import (
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
        merge_attentions,
        neighborhood_attention_1d,
        neighborhood_attention_2d,
        neighborhood_attention_2d_packed,
        neighborhood_attention_3d,
    )
    from .unmask_attention import UnmaskAttention, unmask_attention
elif not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        importlib.import_module("torch")
        return getattr(importlib.reload(sys.modules[__name__]), name)
