"""NATTEN's modules, by the constructors of version 0.21, on this package's layers; and those of 0.17 and 0.14."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from inr_kernels import neighborhood_attention as ops
from inr_kernels.neighborhood_attention.module import NeighborhoodAttention

from . import unfused

Sizes = int | Sequence[int]
Flags = bool | Sequence[bool] | None


class _Module(NeighborhoodAttention):
    """Shared by all versions: NATTEN's attributes, and attention with dropout of its weights."""

    def _finish(self, qk_scale: float | None, attn_drop: float | None = None) -> None:
        """Sets what NATTEN's modules have besides ours. attn_drop: None where the version has no such dropout."""
        self.embed_dim, self.na_dim = self.dim, self.rank
        self.head_dim = self.dim // self.num_heads
        self.scale: float = qk_scale or self.head_dim**-0.5
        if attn_drop is not None:
            self.attn_drop = nn.Dropout(attn_drop)

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        drop: Any = self._modules.get("attn_drop")
        if drop is None or not (drop.training and drop.p):
            return super()._attend(qkv)
        query, key, value = qkv.movedim(-2, 1).unbind(-2)  # heads first
        window = self.kernel_size, self.dilation, None, self.is_causal
        attn = unfused.qk(self.rank, query * self.scale, key, *window, rpb=self.rpb)
        out = unfused.av(self.rank, drop(attn.softmax(-1)), value, *window)
        return out.movedim(1, -2)


class _Module21(_Module):
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: Flags = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        window: dict[str, Any] = {"stride": stride, "is_causal": False if is_causal is None else is_causal}
        layers: Any = {"qkv_bias": qkv_bias, "proj_drop": proj_drop}
        super().__init__(embed_dim, num_heads, kernel_size, dilation, **window, **layers)
        self._finish(qk_scale)


class _Module17(_Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Sizes,
        dilation: Sizes | None = 1,
        is_causal: Flags = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ):
        causal = False if is_causal is None else is_causal
        layers: Any = {"rel_pos_bias": rel_pos_bias, "qkv_bias": qkv_bias, "proj_drop": proj_drop}
        super().__init__(dim, num_heads, kernel_size, dilation or 1, is_causal=causal, **layers)
        self._finish(qk_scale, attn_drop)


class _Module14(_Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Sizes,
        dilation: Sizes | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        layers: Any = {"rel_pos_bias": bias, "qkv_bias": qkv_bias, "proj_drop": proj_drop, "pad_small_inputs": True}
        super().__init__(dim, num_heads, kernel_size, dilation or 1, **layers)
        self._finish(qk_scale, attn_drop)


class NeighborhoodAttention1D(_Module21, ops.NeighborhoodAttention1D):
    """`inr_kernels.NeighborhoodAttention1D` with NATTEN's constructor; qk_scale of None or 0: the default."""


class NeighborhoodAttention2D(_Module21, ops.NeighborhoodAttention2D):
    """`inr_kernels.NeighborhoodAttention2D` with NATTEN's constructor; qk_scale of None or 0: the default."""


class NeighborhoodAttention3D(_Module21, ops.NeighborhoodAttention3D):
    """`inr_kernels.NeighborhoodAttention3D` with NATTEN's constructor; qk_scale of None or 0: the default."""


class NeighborhoodAttention1D17(_Module17, ops.NeighborhoodAttention1D):
    """The module of version 0.17: with rel_pos_bias, off by default, and dropout of the weights (attn_drop)."""


class NeighborhoodAttention2D17(_Module17, ops.NeighborhoodAttention2D):
    """The module of version 0.17: with rel_pos_bias, off by default, and dropout of the weights (attn_drop)."""


class NeighborhoodAttention3D17(_Module17, ops.NeighborhoodAttention3D):
    """The module of version 0.17: with rel_pos_bias, off by default, and dropout of the weights (attn_drop)."""


class NeighborhoodAttention1D14(_Module14, ops.NeighborhoodAttention1D):
    """The module of versions up to 0.15: with a relative position bias by default, and padding of small inputs."""


class NeighborhoodAttention2D14(_Module14, ops.NeighborhoodAttention2D):
    """The module of versions up to 0.15: with a relative position bias by default, and padding of small inputs."""


class NeighborhoodAttention3D14(_Module14, ops.NeighborhoodAttention3D):
    """The module of versions up to 0.15, with kernel_size_d and dilation_d for the depth."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Sizes,
        kernel_size_d: int | None = None,
        dilation: Sizes | None = 1,
        dilation_d: int | None = None,
        *args: Any,
        **options: Any,
    ):
        if kernel_size_d or dilation_d:
            sides: Any = kernel_size, dilation or 1
            kernel_size = kernel_size_d or sides[0], sides[0], sides[0]
            dilation = dilation_d or sides[1], sides[1], sides[1]
        super().__init__(dim, num_heads, kernel_size, dilation, *args, **options)
