"""IN²: fills the missing pixels of an image of any size and shape, by an implicit pyramid."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from inr_kernels._core.checks import require
from inr_kernels.local_implicit.functional import WORKSPACE

from ..common.convolution import Conv3x3
from ..common.deprecated import eager_or_reference
from ..common.frozen import Recomputed
from ..common.masking import known
from ..common.network import WEIGHTS, Inpainter
from ..common.progress import Progress, parameters
from ..common.smooth import resized, smooth_fill
from .blocks import NeighborHybridAttentionGroup, downsampling
from .pyramid import MODES, ImplicitPyramidDecoder

CHOICES = {
    "fill": ("zeros", "smooth"),
    "encoder": ("dpb", "strided", "lama"),
    "body": ("nhab", "ffc"),
    "padding": ("reflect", "zeros", "replicate"),
    "norm": ("batch", "none"),
    "upsample": tuple(MODES),
    "activation": ("tanh", "sigmoid"),
}


@dataclass(frozen=True)
class IN2Config:
    """The structure of an IN². Its code is not published, and the paper leaves many choices open; the defaults have the
    15.5 M parameters of its table 9.

    Args:
        channels: of the encoder's maps, from the largest to the smallest: the paper's "256, 128, and 64", which the
            decoder goes through in reverse.
        down_kernel: of the strided convolutions. 3 (as LaMa) rounds sides up; 4 (as CoordFill) down.
        ratio: share of the global channels in the encoder. 0.75: LaMa.
        padding: of the encoder's convolutions. "reflect": LaMa, for sides of at least 9; with the others one pixel is
            enough.
        norm: after the encoder's convolutions, "batch": LaMa; "none": CoordFill, because batches of 3 are small. (The
            spectral transforms always have theirs.)
        encoder_alpha: weight of channel attention in the encoder. 1: the paper has its alpha only in the body.
        groups, blocks: of the body, and in a group: the paper's 2 and 4.
        heads, window, rel_pos_bias: of its attention. 8 heads of 32 channels, 7 x 7, with a bias: NAT's defaults.
        alpha: weight of channel attention in the body. 0.03: the paper; HAT, which it follows, has 0.01.
        attention_residual: X_M = X + NAB + alpha CAB, as in HAT and NAT; False: eq. 1, without X.
        compress, squeeze: of channel attention. 2 and 16: they give 15.5 M parameters; HAT has 3 and 30.
        mlp_ratio: of the body's MLPs. 4: NAT.
        group_convs: whether every group and the body end in a convolution and a skip connection, as in HAT.
        upsample: f of eq. 2: "split", ReLU of a Linear, then the MLP of eq. 4 once per query; "bilinear", the literal
            reading of eq. 2; "liif", the MLP for each of four neighbours, as LIIF, at four times the cost.
        hidden: widths of its hidden layers. 256: LIIF; as many layers as 15.5 M parameters allow.
        cell_scale: 1: eq. 3; 2: in units of half a pixel, as LIIF.
        fill: what the encoder sees at missing pixels. "zeros": the paper; "smooth": a smooth continuation S of the
            surroundings, to which the network then adds, without an activation, so that a short training is enough.
        activation: of the output. "tanh": the network works in [-1, 1], as CoordFill, which the paper follows;
            "sigmoid": in [0, 1], as LaMa.
        any_size: whether it renders other sizes than the image's, for a network that is trained to. False: refused. The
            paper renders the image's size only; a network that saw no other is 7 dB worse at twice the size than a
            bicubic interpolation of its own fill.
        encoder: "dpb", the paper's downsample processing; "strided", its strided convolutions alone; "lama", LaMa's
            encoder, widened to about the parameters of "dpb", as in the paper's ablation.
        body: "nhab", neighborhood and channel attention; "ffc", two FFC blocks in the place of each block, as in the
            ablation.
        channel_attention: whether encoder and body have any.
        pyramid: False: one layer from the smallest map to the image, as in the ablation.

    The last four are the ablations of the paper's table 7, whose training on squares is a matter of the data. `alpha=1`
    leaves out the small constant before channel attention.

    Departures from the paper, each with a field above or because the paper does not say: attention has a residual
    connection, which eq. 1 lacks; groups end in convolutions and skip connections; f of eq. 2 is nonlinear, as the
    offsets would cancel in a linear one; a 3 x 3 convolution makes colours of the last map; R1 is squared and part of
    the discriminator's step (`models.in2.losses`).

    Raises:
        ValueError: a value that is not supported.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    down_kernel: int = 3
    ratio: float = 0.75
    padding: str = "reflect"
    norm: str = "batch"
    encoder_alpha: float = 1.0
    groups: int = 2
    blocks: int = 4
    heads: int = 8
    window: int = 7
    rel_pos_bias: bool = True
    alpha: float = 0.03
    attention_residual: bool = True
    compress: int = 2
    squeeze: int = 16
    mlp_ratio: float = 4.0
    group_convs: bool = True
    upsample: str = "split"
    hidden: tuple[int, ...] = (256, 256, 256)
    cell_scale: float = 1.0
    fill: str = "zeros"
    activation: str = "tanh"
    any_size: bool = False
    encoder: str = "dpb"
    body: str = "nhab"
    channel_attention: bool = True
    pyramid: bool = True

    def __post_init__(self) -> None:
        for name, values in CHOICES.items():
            value = getattr(self, name)
            require(value in values, name, f"be one of {', '.join(values)}", repr(value))
        require(self.channels, "channels", "not be empty", self.channels)
        require(self.down_kernel in (3, 4), "down_kernel", "be 3 or 4", self.down_kernel)
        for width in self.channels:
            both = 0 < int(width * self.ratio) < width
            require(both, "ratio", f"give a width of {width} at least one local and one global channel", self.ratio)
            minimum = max(self.compress, self.squeeze)
            require(width >= minimum, "channels", f"be at least max(compress, squeeze) = {minimum}", self.channels)
        require(
            self.heads and self.channels[-1] % self.heads == 0,
            "heads",
            f"divide {self.channels[-1]} channels",
            self.heads,
        )

    @property
    def depth(self) -> int:
        """The number of repeated layers, each of which has tensors in the state dict."""
        return len(self.channels) + self.groups * self.blocks + len(self.hidden)

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """The sizes (h, w) of the encoder's maps for an image of `size` (H, W), the largest first."""
        sizes = []
        for _ in self.channels:
            height, width = ((n + 2 - self.down_kernel) // 2 + 1 for n in size)
            size = height, width
            sizes.append(size)
        return sizes

    @property
    def shortest(self) -> int:
        """The shortest side of an image that the encoder's padding allows."""
        minimum = 2 if self.padding == "reflect" else 1
        first = 4 if minimum == 2 and self.encoder == "lama" else minimum  # its 7 x 7 convolution reflects 3 pixels

        def shortest_of_smallest(side: int) -> int:
            """The shortest side of the encoder's smallest map for a square image."""
            *_, smallest = self.grids((side, side))
            return min(smallest)

        return next(side for side in itertools.count(first) if shortest_of_smallest(side) >= minimum)


SMALL = IN2Config(channels=(48,), ratio=0.5, groups=2, blocks=2, heads=4, hidden=(64, 64, 64), alpha=1.0, fill="smooth")


class IN2Features(NamedTuple):
    """The features of an IN², which `IN2.encode` returns.

    Attributes:
        feat: the body's map [B, C, h, w].
        grids: the sizes (h, w) of the encoder's larger maps, the smallest first; () without a pyramid.
        seen: with `fill="smooth"`, S [B, 3, H, W].
    """

    feat: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    seen: torch.Tensor | None = None


class IN2(Inpainter):
    """IN², an implicit neural inpainting network of three parts:

        encoder: [I (1 - M); M] -> maps of a half, a quarter and an eighth of the size, by `DownsampleProcessingBlock`
        body:    two groups of four `NeighborHybridAttentionBlock` on the smallest
        decoder: `ImplicitPyramidDecoder`, over the encoder's grids to the image's own, or, with `any_size`, to any

    15,501,919 parameters. The input is not padded or resized: the grids have the sizes of the encoder's maps, and on
    maps smaller than the attention's window the window is the whole map. Everything runs in the parameters' dtype or
    autocast's, coordinates in float32.

    `IN2.pretrained()` has 336 K parameters and one level, in half precision in the file. It was trained on fifteen
    photographs (`training/configs/in2_small.yaml`; `notes` name them and hold the recipe) for 11 minutes on one
    shared core. PSNR on the middle of scikit-image's held-out `coffee` with strokes over 15 % of the pixels: 32.31 dB
    (32.07 at 253 x 381); OpenCV's method of Telea has 31.09 (30.80). In the holes alone, on the mean of the middle
    256 x 256 pixels of four held-out photographs and three masks of each (`free_form_mask`, the seeds 0, 1 and 2):
    22.54 dB; the smooth fill that the network starts from has 21.84, Telea's method 21.11. It refuses other sizes than
    the input's (`IN2Config.any_size`).

    Args:
        config: an IN2Config.
        eager: the same network in plain PyTorch, without kernels of this package, for comparison.
        reference: deprecated alias of eager.

    Source: Zhao, Yang and Fu, Learning Position-Aware Implicit Neural Network for Real-World Face Inpainting, 2024.

    Example:
        >>> model = IN2(IN2Config(channels=(16, 16, 32), blocks=1, hidden=(32, 32))).eval()
        >>> image, mask = torch.rand(1, 3, 43, 59), torch.zeros(1, 43, 59, dtype=torch.bool)
        >>> mask[:, 5:12, 8:20] = True  # missing
        >>> model.inpaint(image, mask).shape
        torch.Size([1, 3, 43, 59])
    """

    NETWORK = "IN2"
    CONFIG = IN2Config
    KEY = "decoder.head.weight"
    PRETRAINED = WEIGHTS / "in2_small.safetensors"
    bytes_per_output_pixel = 108  # the nine taps of the head's three channels

    def __init__(self, config: IN2Config = IN2Config(), *, eager: bool = False, reference: bool | None = None):
        super().__init__()
        self.config, self.notes = config, {}
        self.eager = eager = eager_or_reference(eager, reference)
        channels = config.channels
        self.encoder = downsampling(config, eager=eager)
        groups = (NeighborHybridAttentionGroup(channels[-1], config, eager=eager) for _ in range(config.groups))
        self.body = nn.Sequential(*groups)
        self.body_conv = Conv3x3(channels[-1], channels[-1], eager) if config.group_convs else None
        self.decoder = ImplicitPyramidDecoder(
            (*(reversed(channels) if config.pyramid else channels[-1:]), channels[0]),
            hidden=config.hidden,
            mode=config.upsample,
            cell_scale=config.cell_scale,
            eager=eager,
        )
        if config.fill == "smooth":  # a new network starts from S
            nn.init.zeros_(self.decoder.head.weight)
            if self.decoder.head.bias is not None:
                nn.init.zeros_(self.decoder.head.bias)

    def encode(self, image: torch.Tensor, mask: torch.Tensor) -> IN2Features:
        """Returns `IN2Features` (feat, grids, seen).

        Arguments and errors: as `Inpainter.encode`; sides of at least `config.shortest`.
        """
        dtype = self.decoder.head.weight.dtype
        mask, image = self._mask(image, mask).to(dtype), image.to(dtype)
        smooth, symmetric = self.config.fill == "smooth", self.config.activation == "tanh"
        seen = smooth_fill(known(image, mask), mask) if smooth else None
        if seen is not None:
            x = seen * 2 - 1 if symmetric else seen
        else:
            x = known(image * 2 - 1 if symmetric else image, mask)
        x = torch.cat((x, mask), 1)
        grids: list[Any] = []
        for block in self.encoder:
            x = block(x)
            grids.append(x.shape[2:])
        out = self.body(x)
        if self.body_conv is not None:
            out = self.body_conv(out, add=x)
        return IN2Features(out, tuple(grids[-2::-1]) if self.config.pyramid else (), seen)

    @property
    def min_side(self) -> int:
        """As `IN2Config.shortest`."""
        return self.config.shortest

    @property
    def any_size(self) -> bool:
        """As `IN2Config.any_size`."""
        return self.config.any_size

    def _work(self, image: torch.Tensor, size: tuple[int, int]) -> tuple[float, float, float]:
        """Multiplications: each part's parameters, at the size of its map."""
        grids = [len(image) * math.prod(grid) for grid in self.config.grids(tuple(image.shape[2:]))]
        encoding = sum(parameters(block) * n for block, n in zip(self.encoder, grids, strict=True))
        inner = grids[-2::-1] if self.config.pyramid else []
        decoding = sum(self.decoder.work([*inner, len(image) * math.prod(size)]))
        return encoding + parameters(self.body) * grids[-1], 0, decoding

    def _encoding_modules(self) -> list[tuple[nn.Module, float]]:
        groups: Any = self.body
        levels = [*enumerate(self.encoder, 1), *((len(self.encoder), b) for group in groups for b in group.blocks)]
        return [(block, parameters(block) / 4**level) for level, block in levels]

    def decode(
        self,
        features: tuple[Any, ...],
        size: tuple[int, int],
        *,
        workspace: int = WORKSPACE,
        progress: Progress = None,
    ) -> torch.Tensor:
        """As `Inpainter.decode`, from `IN2Features` or a plain tuple (feat, grids) or (feat, grids, seen); with
        `fill="zeros"` in [0, 1]. The inner layers always render onto the encoder's grids."""
        feat, grids, seen = IN2Features(*features)
        out = self.decoder(feat, [*grids, size], workspace=workspace, progress=progress)
        if seen is not None:
            return out + resized(seen, size).to(out.dtype)
        return (out.tanh() + 1) / 2 if self.config.activation == "tanh" else out.sigmoid()

    def frozen(self, workspace: int = WORKSPACE) -> "IN2":
        """As `Inpainter.frozen`: every layer of the decoder can be computed again in the backward."""
        model = super().frozen(workspace)
        model.decoder.layers = nn.ModuleList(map(Recomputed, model.decoder.layers))
        return model

    def bytes_per_pixel(self) -> int:
        """Estimates the memory that `inpaint` needs for a pixel of the input, in addition to workspace and output."""
        first = 8 if self.config.encoder == "lama" else 2.5  # its first map has the image's size
        values = first * self.config.channels[0] + 12  # the first maps; images, masks and their copies
        return round(values * max(4, self.decoder.head.weight.element_size()))
