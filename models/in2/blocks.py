"""The blocks of IN²: downsampling with global context, and neighborhood attention with channel attention."""

from typing import Any

import torch
from torch import nn

from inr_kernels import NeighborhoodAttention2D, neighborhood_attention_2d_packed
from inr_kernels.fourier_unit import FFC_BN_ACT, FFCResnetBlock, conv3x3

from . import eager as plain_pytorch


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution with zero padding."""

    def __init__(self, inputs: int, outputs: int, eager: bool = False):
        super().__init__(inputs, outputs, 3, padding=1)
        self.eager = eager

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, H, W], plus `add` of that shape."""
        if not self.eager:
            return conv3x3(x, self.weight, self.bias, add=add, padding="zeros")
        out = super().forward(x)
        return out if add is None else out + add


class ChannelGate(nn.Module):
    """x sigmoid(W_2 ReLU(W_1 mean(x))): scales every channel by a function of all channels' means."""

    def __init__(self, channels: int, squeeze: int):
        super().__init__()
        inner = channels // squeeze
        layers = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1)
        self.attention = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return x * self.attention(x)


class ChannelAttentionBlock(nn.Module):
    """CAB: two convolutions, then `ChannelGate`, with HAT's state-dict keys, `cab.*`.

    Args:
        channels: of [B, C, H, W], in and out.
        compress: the convolutions have channels // compress between them.
        squeeze: the gate has channels // squeeze.
        eager: plain PyTorch.

    Source: Chen et al., Activating More Pixels in Image Super-Resolution Transformer (HAT), CVPR 2023.

    Example:
        >>> ChannelAttentionBlock(16, compress=2, squeeze=4)(torch.randn(1, 16, 5, 7)).shape
        torch.Size([1, 16, 5, 7])
    """

    def __init__(self, channels: int, compress: int, squeeze: int, *, eager: bool = False):
        super().__init__()
        first, last = ((channels, channels // compress), (channels // compress, channels))
        layers = Conv3x3(*first, eager), nn.GELU(), Conv3x3(*last, eager), ChannelGate(channels, squeeze)
        self.cab = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.cab(x)


class DownsampleProcessingBlock(nn.Module):
    """DPB: y = FFC block(strided FFC(x)), out = y + alpha CAB(y), on half the rows and columns, rounded up.

    Args:
        inputs, outputs: channels.
        config: an IN2Config.
        eager: plain PyTorch, in LaMa's order of operations.
    """

    def __init__(self, inputs: int, outputs: int, config: Any, *, eager: bool = False):
        super().__init__()
        norm = {"batch": nn.BatchNorm2d, "none": nn.Identity}[config.norm]
        common: dict[str, Any] = {"norm_layer": norm, "activation_layer": nn.ReLU, "enable_lfu": False}
        common |= {"padding_type": config.padding, "ratio_gout": config.ratio}
        self.down = FFC_BN_ACT(inputs, outputs, config.down_kernel, ratio_gin=0, stride=2, padding=1, **common)
        self.block = FFCResnetBlock(outputs, ratio_gin=config.ratio, **common)
        self.attention = ChannelAttentionBlock(outputs, config.compress, config.squeeze, eager=eager)
        self.alpha, self.eager = config.encoder_alpha, eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        if self.eager:
            parts = plain_pytorch.ffc_resnet_block(self.block, plain_pytorch.ffc_bn_act(self.down, x))
        else:
            parts = self.block(self.down(x))
        x = torch.cat(parts, 1)
        return x + self.alpha * self.attention(x)


class ClampedAttention(NeighborhoodAttention2D):
    """`NeighborhoodAttention2D` whose window shrinks to the map where the map is smaller."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, *, rel_pos_bias: bool, eager: bool = False):
        super().__init__(dim, num_heads, kernel_size, rel_pos_bias=rel_pos_bias)
        self.eager = eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        height, width = (min(k, int(n)) for k, n in zip(self.kernel_size, x.shape[1:3], strict=True))
        kernel = (height, width)
        rpb: torch.Tensor | None = self.rpb
        if rpb is not None:  # its middle: the distances in the smaller window
            y, x_ = (slice(k - n, k + n - 1) for k, n in zip(self.kernel_size, kernel, strict=True))
            rpb = rpb[:, y, x_]
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, -1))
        if self.eager:
            query, key, value = qkv.unbind(3)
            out: Any = plain_pytorch.neighborhood_attention(query, key, value, kernel, rpb)
        else:
            out = neighborhood_attention_2d_packed(qkv, kernel, rpb=rpb)
        return self.proj(out.flatten(3))


class NeighborHybridAttentionBlock(nn.Module):
    """NHAB: n = LN(x), m = x + NA(n) + alpha CAB(n), out = m + MLP(LN(m)).

    With `config.attention_residual` off, m has no x (eq. 1).

    Args:
        channels: C.
        config: an IN2Config.
        eager: plain PyTorch.
    """

    def __init__(self, channels: int, config: Any, *, eager: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = ClampedAttention(
            channels, config.heads, config.window, rel_pos_bias=config.rel_pos_bias, eager=eager
        )
        self.channel_attention = ChannelAttentionBlock(channels, config.compress, config.squeeze, eager=eager)
        inner = int(channels * config.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, inner), nn.GELU(), nn.Linear(inner, channels))
        self.alpha, self.residual = config.alpha, config.attention_residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        normed = self.norm1(x)
        mixed = self.attention(normed)
        mixed = x + mixed if self.residual else mixed
        mixed = mixed + self.alpha * self.channel_attention(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return mixed + self.mlp(self.norm2(mixed))


class NeighborHybridAttentionGroup(nn.Module):
    """`config.blocks` blocks, then, with `config.group_convs`, a 3 x 3 convolution and a skip connection, as in HAT.

    Args:
        channels: C.
        config: an IN2Config.
        eager: plain PyTorch.
    """

    def __init__(self, channels: int, config: Any, *, eager: bool = False):
        super().__init__()
        blocks = (NeighborHybridAttentionBlock(channels, config, eager=eager) for _ in range(config.blocks))
        self.blocks = nn.Sequential(*blocks)
        self.conv = Conv3x3(channels, channels, eager) if config.group_convs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        out = self.blocks(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        return out if self.conv is None else self.conv(out, add=x)
