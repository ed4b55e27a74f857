"""NeighborhoodAttention2D: neighborhood attention with its projections, and NATTEN's state dict."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inr_kernels._core.checks import require, require_tensor, shape

from .functional import check_pair, neighborhood_attention_2d_packed


class NeighborhoodAttention2D(nn.Module):
    """Computes proj(neighborhood attention(qkv(x))) on maps [B, H, W, dim], with heads of dim / num_heads channels.

    The state dict is that of NATTEN's module of this name, in every version: `qkv`, `proj` and, with rel_pos_bias,
    `rpb` (which versions up to 0.15 had by default).

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: number of heads.
        kernel_size, dilation: of the window, an integer or a pair; as in `neighborhood_attention_2d`.
        rel_pos_bias: whether to learn a relative position bias.
        qkv_bias: whether the first projection has a bias.
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
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        pad_small_inputs: bool = False,
    ):
        super().__init__()
        require(num_heads > 0 and dim > 0 and dim % num_heads == 0, "dim", f"be a multiple of {num_heads} heads", dim)
        self.dim, self.num_heads, self.pad_small_inputs = dim, num_heads, pad_small_inputs
        self.kernel_size, self.dilation = check_pair(kernel_size, "kernel_size"), check_pair(dilation, "dilation")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(self.qkv.weight.new_empty(num_heads, *(2 * k - 1 for k in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, W, dim] -> [B, H, W, dim]."""
        require_tensor(x, "x", dims=(4,))
        require(x.shape[3] == self.dim, "x", f"have shape [B, H, W, {self.dim}]", shape(x))
        height, width = x.shape[1:3]
        if self.pad_small_inputs:
            below, right = (
                max(0, k * d - n) for k, d, n in zip(self.kernel_size, self.dilation, (height, width), strict=True)
            )
            x = F.pad(x, (0, 0, 0, right, 0, below))
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, -1))
        out: Any = neighborhood_attention_2d_packed(qkv, self.kernel_size, dilation=self.dilation, rpb=self.rpb)
        return self.proj(out[:, :height, :width].flatten(3))

    def extra_repr(self) -> str:
        """The options, for print."""
        options = f"{self.dim}, {self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"
        return options + (", pad_small_inputs=True" if self.pad_small_inputs else "")
