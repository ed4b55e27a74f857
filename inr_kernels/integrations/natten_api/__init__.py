"""NATTEN's public names on this package's ops: for code that imports NATTEN, on any device, with gradients.

In code that can be edited, replace the import:

    from inr_kernels.integrations.natten_api import NeighborhoodAttention2D, na2d

Signatures are those of NATTEN 0.21, and the functions that version 0.20 removed have those of the last version that had
them. What only chooses NATTEN's kernels is accepted and ignored: tile shapes, `kernel_schedule`, `torch_compile`, names
of NATTEN's backends. A keyword that NATTEN does not have raises. For code that cannot be edited: `install_as_natten`.
"""

from .fused import attention, merge_attentions, na1d, na2d, na3d, neighborhood_attention_generic
from .install import install_as_natten
from .modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from .unfused import (
    na1d_av,
    na1d_qk,
    na1d_qk_with_bias,
    na2d_av,
    na2d_qk,
    na2d_qk_with_bias,
    na3d_av,
    na3d_qk,
    na3d_qk_with_bias,
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "attention",
    "install_as_natten",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
    "neighborhood_attention_generic",
]
