"""NeighborhoodAttention1D, 2D and 3D: neighborhood attention with its projections, and NATTEN's state dict."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core.checks import require, require_tensor, shape

from .arguments import AXES
from .functional import attend_packed, check_axes, check_causal


class NeighborhoodAttention(nn.Module):
    """The base of the three modules. rank: the number of axes."""

    rank = 0

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        *,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        pad_small_inputs: bool = False,
    ):
        super().__init__()
        require(num_heads > 0 and dim > 0 and dim % num_heads == 0, "dim", f"be a multiple of {num_heads} heads", dim)
        self.dim, self.num_heads, self.pad_small_inputs = dim, num_heads, pad_small_inputs
        self.kernel_size = check_axes(kernel_size, "kernel_size", self.rank)
        self.dilation, self.stride = (
            check_axes(v, name, self.rank) for v, name in ((dilation, "dilation"), (stride, "stride"))
        )
        self.is_causal, self.scale = check_causal(is_causal, self.rank), qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(self.qkv.weight.new_empty(num_heads, *(2 * k - 1 for k in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ..., dim] -> [B, ..., dim], with as many axes as the module has."""
        require_tensor(x, "x", dims=(self.rank + 2,))
        expected = f"have shape [B, {', '.join(AXES[self.rank])}, {self.dim}]"
        require(x.shape[-1] == self.dim, "x", expected, shape(x))
        size = x.shape[1:-1]
        if self.pad_small_inputs:
            sides = list(zip(self.kernel_size, self.dilation, size, strict=True))
            x = F.pad(x, [0, 0, *(n for k, d, length in sides[::-1] for n in (0, max(0, k * d - length)))])
        out = self._attend(self.qkv(x).unflatten(-1, (3, self.num_heads, -1)))
        for axis, length in enumerate(size, 1):
            out = out.narrow(axis, 0, length)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """The attention of qkv [B, ..., 3, heads, dim / heads]."""
        options = self.kernel_size, self.dilation, self.stride, self.is_causal, self.rpb, self.scale
        out: Any = attend_packed(self.rank, qkv, *options)
        return out

    def extra_repr(self) -> str:
        """The options, for print."""
        options = f"{self.dim}, {self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"
        scale = (self.dim // self.num_heads) ** -0.5
        given: dict[str, Any] = {
            "stride": (self.stride, (1,) * self.rank),
            "is_causal": (self.is_causal, (False,) * self.rank),
            "qk_scale": (scale if self.scale is None else self.scale, scale),
            "pad_small_inputs": (self.pad_small_inputs, False),
        }
        return options + "".join(f", {name}={value}" for name, (value, default) in given.items() if value != default)


class NeighborhoodAttention1D(NeighborhoodAttention):
    """Computes proj(neighborhood attention(qkv(x))) on sequences [B, L, dim].

    As `NeighborhoodAttention2D`, with the state dict of NATTEN's module of this name.

    Args:
        dim, num_heads, rel_pos_bias, qkv_bias, qk_scale, proj_drop, pad_small_inputs: see there; rpb is
            [heads, 2 kernel_size - 1].
        kernel_size, dilation, stride, is_causal: of the window, one value each.

    Example:
        >>> import torch
        >>> NeighborhoodAttention1D(32, 4, kernel_size=5, dilation=2)(torch.randn(1, 20, 32)).shape
        torch.Size([1, 20, 32])
    """

    rank = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """Computes proj(neighborhood attention(qkv(x))) on maps [B, H, W, dim], with heads of dim / num_heads channels.

    The state dict is that of NATTEN's module of this name, in every version: `qkv`, `proj` and, with rel_pos_bias,
    `rpb` (which versions up to 0.15 had by default).

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: number of heads.
        kernel_size, dilation, stride, is_causal: of the window, one value or a pair; as in `neighborhood_attention_2d`.
        rel_pos_bias: whether to learn a relative position bias.
        qkv_bias: whether the first projection has a bias.
        qk_scale: factor of the scores; None: (dim / num_heads) ** -0.5.
        proj_drop: probability with which dropout sets an output of the last projection to zero in training.
        pad_small_inputs: how to treat a map smaller than kernel_size x dilation. True: it is padded with zeros at the
            bottom and on the right before the first projection, and the result is cropped, as NATTEN did up to 0.15;
            False: ValueError.

    Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023.

    Example:
        >>> import torch
        >>> NeighborhoodAttention2D(32, 4, kernel_size=5)(torch.randn(1, 9, 8, 32)).shape
        torch.Size([1, 9, 8, 32])
    """

    rank = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """Computes proj(neighborhood attention(qkv(x))) on volumes or videos [B, D, H, W, dim].

    As `NeighborhoodAttention2D`, with the state dict of NATTEN's module of this name.

    Args:
        dim, num_heads, rel_pos_bias, qkv_bias, qk_scale, proj_drop, pad_small_inputs: see there; rpb is
            [heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1].
        kernel_size, dilation, stride, is_causal: of the window, one value or three.

    Example:
        >>> import torch
        >>> NeighborhoodAttention3D(32, 4, kernel_size=(3, 5, 5))(torch.randn(1, 6, 9, 8, 32)).shape
        torch.Size([1, 6, 9, 8, 32])
    """

    rank = 3
