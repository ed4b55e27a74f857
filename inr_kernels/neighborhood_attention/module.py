"""NeighborhoodAttention1D and 2D: neighborhood attention with its projections, and NATTEN's state dict."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core.checks import require, require_tensor, shape

from .functional import check_causal, check_pair, neighborhood_attention_2d_packed


class NeighborhoodAttention2D(nn.Module):
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

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        *,
        stride: int | tuple[int, int] = 1,
        is_causal: bool | tuple[bool, bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        pad_small_inputs: bool = False,
    ):
        super().__init__()
        require(num_heads > 0 and dim > 0 and dim % num_heads == 0, "dim", f"be a multiple of {num_heads} heads", dim)
        self.dim, self.num_heads, self.pad_small_inputs = dim, num_heads, pad_small_inputs
        self.kernel_size, self.dilation = check_pair(kernel_size, "kernel_size"), check_pair(dilation, "dilation")
        self.stride, self.is_causal, self.scale = check_pair(stride, "stride"), check_causal(is_causal), qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(self.qkv.weight.new_empty(num_heads, *self._bias_size()))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _bias_size(self) -> list[int]:
        return [2 * k - 1 for k in self.kernel_size]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, W, dim] -> [B, H, W, dim]."""
        require_tensor(x, "x", dims=(4,))
        require(x.shape[3] == self.dim, "x", f"have shape [B, H, W, {self.dim}]", shape(x))
        return self._attend(x, self.rpb)

    def _attend(self, x, rpb):
        height, width = x.shape[1:3]
        if self.pad_small_inputs:
            below, right = (
                max(0, k * d - n) for k, d, n in zip(self.kernel_size, self.dilation, (height, width), strict=True)
            )
            x = F.pad(x, (0, 0, 0, right, 0, below))
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, -1))
        window: dict[str, Any] = {"dilation": self.dilation, "stride": self.stride, "is_causal": self.is_causal}
        out: Any = neighborhood_attention_2d_packed(qkv, self.kernel_size, **window, rpb=rpb, scale=self.scale)
        return self.proj_drop(self.proj(out[:, :height, :width].flatten(3)))

    def extra_repr(self) -> str:
        """The options, for print."""
        options = f"{self.dim}, {self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"
        given: dict[str, Any] = {"stride": (self.stride, (1, 1)), "is_causal": (self.is_causal, (False, False))}
        given |= {"qk_scale": (self.scale, None), "pad_small_inputs": (self.pad_small_inputs, False)}
        return options + "".join(f", {name}={value}" for name, (value, default) in given.items() if value != default)


class NeighborhoodAttention1D(NeighborhoodAttention2D):
    """Computes proj(neighborhood attention(qkv(x))) on sequences [B, L, dim].

    `NeighborhoodAttention2D` on maps of one row, with the state dict of NATTEN's module of this name.

    Args:
        dim, num_heads: see there.
        kernel_size, dilation, stride, is_causal: of the window, one value each.
        options: rel_pos_bias, qkv_bias, qk_scale, proj_drop, pad_small_inputs; see there. rpb is
            [heads, 2 kernel_size - 1].

    Example:
        >>> import torch
        >>> NeighborhoodAttention1D(32, 4, kernel_size=5, dilation=2)(torch.randn(1, 20, 32)).shape
        torch.Size([1, 20, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        *,
        stride: int = 1,
        is_causal: bool = False,
        **options: Any,
    ):
        row: dict[str, Any] = {"stride": (1, stride), "is_causal": (False, is_causal)}
        super().__init__(dim, num_heads, (1, kernel_size), (1, dilation), **row, **options)

    def _bias_size(self) -> list[int]:
        return [2 * self.kernel_size[1] - 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, L, dim] -> [B, L, dim]."""
        require_tensor(x, "x", dims=(3,))
        require(x.shape[2] == self.dim, "x", f"have shape [B, L, {self.dim}]", shape(x))
        return self._attend(x.unsqueeze(1), None if self.rpb is None else self.rpb.unsqueeze(1)).squeeze(1)
