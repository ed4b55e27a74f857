"""The blocks of IN²: downsampling with global context, neighborhood attention with channel attention, and what takes
their place in the paper's ablations.
"""

import itertools
from typing import Any

import torch
from torch import nn

from inr_kernels import NeighborhoodAttention2D, neighborhood_attention_2d_packed
from inr_kernels._core.hooks import is_untouched
from inr_kernels.fourier_unit import FFC_BN_ACT, FFCResnetBlock
from inr_kernels.local_implicit import mlp

from ..common.convolution import Conv3x3
from . import eager as plain_pytorch

LAMA_WIDTH = 3.25  # of LaMa's encoder, in the widths of the maps: about the parameters of the downsample processing


def linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """layer(x), [..., C] -> [..., O], by `mlp` unless the Linear was replaced or has hooks."""
    if type(layer) is nn.Linear and is_untouched(layer):
        return mlp(x, [layer.weight], [layer.bias])
    return layer(x)


def residual_mlp(x: torch.Tensor, norm: Any, layers: Any) -> torch.Tensor:
    """x + layers(norm(x)), [..., C], by `mlp` unless a layer was replaced or has hooks."""
    plain = type(norm) is nn.LayerNorm and norm.weight is not None and norm.normalized_shape == x.shape[-1:]
    plain = plain and type(layers) is nn.Sequential and is_untouched(norm, layers, *layers)
    if not (plain and [type(layer) for layer in layers] == [nn.Linear, nn.GELU, nn.Linear]):
        return x + layers(norm(x))
    first, activation, last = layers
    if activation.approximate != "none":
        return x + layers(norm(x))
    options = {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps, "add": x}
    return mlp(x, [first.weight, last.weight], [first.bias, last.bias], **options)


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


def add_channel_attention(add: torch.Tensor, block: Any, x: torch.Tensor, alpha: float) -> torch.Tensor:
    """add + alpha block(x), [B, C, H, W], where possible in one pass over the last map."""
    plain = type(block) is ChannelAttentionBlock and type(block.cab) is nn.Sequential
    if not (plain and type(block.cab[-1]) is ChannelGate and is_untouched(block, block.cab, block.cab[-1])):
        return add + alpha * block(x)
    *layers, gate = block.cab
    for layer in layers:
        x = layer(x)
    return torch.addcmul(add, x, alpha * gate.attention(x))


def ffc_options(config: Any) -> dict[str, Any]:
    """The options that an IN2Config gives to the layers of LaMa."""
    norm = {"batch": nn.BatchNorm2d, "none": nn.Identity}[config.norm]
    return {"norm_layer": norm, "activation_layer": nn.ReLU, "enable_lfu": False, "padding_type": config.padding}


def downsampling(config: Any, *, eager: bool = False) -> nn.ModuleList:
    """The encoder of an IN2Config: a block for each of its maps, which halves the sides.

    LaMa's encoder is a 7 x 7 convolution at the image's size and strided ones, of which the last has global channels.
    It is wider here than its maps, because the paper increases its parameters for the comparison.
    """
    channels = config.channels
    if config.encoder != "lama":
        pairs = itertools.pairwise((4, *channels))
        return nn.ModuleList(DownsampleProcessingBlock(*pair, config, eager=eager) for pair in pairs)
    stem, *inner = (int(LAMA_WIDTH * width) for width in (channels[0] // 2, *channels[:-1]))
    blocks: list[Any] = [LocalDownsampling(*pair, config) for pair in itertools.pairwise((stem, *inner))]
    last = inner[-1] if inner else stem
    blocks.append(DownsampleProcessingBlock(last, channels[-1], config, eager=eager))
    blocks[0] = nn.Sequential(LocalDownsampling(4, stem, config, kernel=7, stride=1), blocks[0])
    return nn.ModuleList(blocks)


class LocalDownsampling(nn.Sequential):
    """A convolution, a norm and ReLU: the layers of LaMa's encoder that have no global channels."""

    def __init__(self, inputs: int, outputs: int, config: Any, kernel: int = 0, stride: int = 2):
        kernel = kernel or config.down_kernel
        norm: nn.Module = nn.BatchNorm2d(outputs) if config.norm == "batch" else nn.Identity()
        padding: dict[str, Any] = {"padding": (kernel - 1) // 2, "padding_mode": config.padding}
        super().__init__(nn.Conv2d(inputs, outputs, kernel, stride, bias=False, **padding), norm, nn.ReLU())


class DownsampleProcessingBlock(nn.Module):
    """DPB: y = FFC block(strided FFC(x)), out = y + alpha CAB(y), on half the rows and columns, rounded up.

    Unless `config.encoder` is "dpb" the strided FFC is all of it; without `config.channel_attention`, out = y.

    Args:
        inputs, outputs: channels.
        config: an IN2Config.
        eager: plain PyTorch, in LaMa's order of operations.
    """

    def __init__(self, inputs: int, outputs: int, config: Any, *, eager: bool = False):
        super().__init__()
        common, processing = ffc_options(config) | {"ratio_gout": config.ratio}, config.encoder == "dpb"
        self.down = FFC_BN_ACT(inputs, outputs, config.down_kernel, ratio_gin=0, stride=2, padding=1, **common)
        self.block = FFCResnetBlock(outputs, ratio_gin=config.ratio, **common) if processing else None
        self.attention = None
        if processing and config.channel_attention:
            self.attention = ChannelAttentionBlock(outputs, config.compress, config.squeeze, eager=eager)
        self.alpha, self.eager = config.encoder_alpha, eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        parts: Any = plain_pytorch.ffc_bn_act(self.down, x) if self.eager else self.down(x)
        if self.block is not None:
            parts = plain_pytorch.ffc_resnet_block(self.block, parts) if self.eager else self.block(parts)
        x = torch.cat(parts, 1)
        return x if self.attention is None else add_channel_attention(x, self.attention, x, self.alpha)


class FourierBlock(nn.Module):
    """Two FFC blocks in the place of a `NeighborHybridAttentionBlock`, of about as many parameters.

    Args:
        channels: C.
        config: an IN2Config.
        eager: plain PyTorch, in LaMa's order of operations.
    """

    def __init__(self, channels: int, config: Any, *, eager: bool = False):
        super().__init__()
        common = ffc_options(config) | {"ratio_gin": config.ratio, "ratio_gout": config.ratio}
        self.blocks: Any = nn.ModuleList(FFCResnetBlock(channels, **common) for _ in range(2))
        self.widths, self.eager = [channels - int(channels * config.ratio), int(channels * config.ratio)], eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        parts: Any = x.split(self.widths, 1)
        for block in self.blocks:
            parts = plain_pytorch.ffc_resnet_block(block, parts) if self.eager else block(parts)
        return torch.cat(parts, 1)


class ClampedAttention(NeighborhoodAttention2D):
    """`NeighborhoodAttention2D` whose window shrinks to the map where the map is smaller."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, *, rel_pos_bias: bool, eager: bool = False):
        super().__init__(dim, num_heads, kernel_size, rel_pos_bias=rel_pos_bias)
        self.eager = eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        rpb: torch.Tensor | None = self.rpb
        if self.eager:
            query, key, value = self.qkv(x).unflatten(3, (3, self.num_heads, -1)).unbind(3)
            return self.proj(plain_pytorch.neighborhood_attention(query, key, value, self.kernel_size, rpb).flatten(3))
        qkv = linear(self.qkv, x).unflatten(3, (3, self.num_heads, -1))
        height, width = (min(k, int(n)) for k, n in zip(self.kernel_size, x.shape[1:3], strict=True))
        kernel = (height, width)
        if rpb is not None:  # its middle: the distances in the smaller window
            y, x_ = (slice(k - n, k + n - 1) for k, n in zip(self.kernel_size, kernel, strict=True))
            rpb = rpb[:, y, x_]
        out: Any = neighborhood_attention_2d_packed(qkv, kernel, rpb=rpb)
        return linear(self.proj, out.flatten(3))


class NeighborHybridAttentionBlock(nn.Module):
    """NHAB: n = LN(x), m = x + NA(n) + alpha CAB(n), out = m + MLP(LN(m)).

    With `config.attention_residual` off, m has no x (eq. 1); with `config.channel_attention` off, no CAB.

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
        self.channel_attention = None
        if config.channel_attention:
            self.channel_attention = ChannelAttentionBlock(channels, config.compress, config.squeeze, eager=eager)
        inner = int(channels * config.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, inner), nn.GELU(), nn.Linear(inner, channels))
        self.alpha, self.residual, self.eager = config.alpha, config.attention_residual, eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        normed = self.norm1(x)
        mixed = self.attention(normed)
        mixed = x + mixed if self.residual else mixed
        if self.channel_attention is not None:
            maps, add = (t.permute(0, 3, 1, 2) for t in (normed, mixed))
            mixed = add_channel_attention(add, self.channel_attention, maps, self.alpha).permute(0, 2, 3, 1)
        return mixed + self.mlp(self.norm2(mixed)) if self.eager else residual_mlp(mixed, self.norm2, self.mlp)


class NeighborHybridAttentionGroup(nn.Module):
    """`config.blocks` blocks, then, with `config.group_convs`, a 3 x 3 convolution and a skip connection, as in HAT.

    The blocks are `NeighborHybridAttentionBlock`, or `FourierBlock` if `config.body` is "ffc".

    Args:
        channels: C.
        config: an IN2Config.
        eager: plain PyTorch.
    """

    def __init__(self, channels: int, config: Any, *, eager: bool = False):
        super().__init__()
        self.attends = config.body == "nhab"
        block: type[nn.Module] = NeighborHybridAttentionBlock if self.attends else FourierBlock
        self.blocks = nn.Sequential(*(block(channels, config, eager=eager) for _ in range(config.blocks)))
        self.conv = Conv3x3(channels, channels, eager) if config.group_convs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if self.attends:
            out = self.blocks(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        else:
            out = self.blocks(x)
        return out if self.conv is None else self.conv(out, add=x)
