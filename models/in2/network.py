"""IN²: fills the holes of a picture of any size and shape, by an implicit pyramid."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from inr_kernels._core.checks import require, require_tensor, shape

from ..common import checkpoints
from ..common.graphs import graphed_pair
from ..common.masking import known, output_size
from .blocks import Conv3x3, DownsampleProcessingBlock, NeighborHybridAttentionGroup
from .pyramid import MODES, ImplicitPyramidDecoder

PRETRAINED = Path(__file__).parents[1] / "weights" / "in2_small.safetensors"
CHOICES = {
    "padding": ("reflect", "zeros", "replicate"),
    "norm": ("batch", "none"),
    "upsample": tuple(MODES),
    "activation": ("tanh", "sigmoid"),
}


@dataclass(frozen=True)
class IN2Config:
    """What fixes an IN². No code of it is published, and the paper leaves much open; the defaults have the 15.5 M
    parameters of its table 9.

    Args:
        channels: of the encoder's maps, from the largest to the smallest: the paper's "256, 128, and 64", which the
            decoder goes through backwards.
        down_kernel: of the strided convolutions. 3: LaMa's, sides are rounded up; 4: CoordFill's, rounded down.
        ratio: share of the global channels in the encoder. 0.75: LaMa.
        padding: of its convolutions. "reflect": LaMa, for sides from 9 on; with the others one pixel is enough.
        norm: after its convolutions, "batch": LaMa; "none": CoordFill, because batches of 3 are small. (The spectral
            transforms keep theirs.)
        encoder_alpha: weight of channel attention in the encoder. 1: the paper has its alpha in the body alone.
        groups, blocks: of the body, and in a group: the paper's 2 and 4.
        heads, window, rel_pos_bias: of its attention. 8 heads of 32 channels, 7 x 7, with a bias: NAT's defaults.
        alpha: weight of channel attention in the body. 0.03: the paper, though HAT, which it follows, has 0.01.
        attention_residual: X_M = X + NAB + alpha CAB, as in HAT and NAT; False: eq. 1, without X.
        compress, squeeze: of channel attention. 2 and 16: they give 15.5 M parameters; HAT has 3 and 30.
        mlp_ratio: of the body's MLPs. 4: NAT.
        group_convs: whether a convolution and a skip end every group and the body, as in HAT.
        upsample: f of eq. 2: "split", ReLU of a Linear, then the MLP of eq. 4 once a query; "bilinear", eq. 2's words
            "the weight"; "liif", the MLP for each of four neighbours, as LIIF, at four times the cost.
        hidden: widths of its hidden layers. LIIF's 256; the number is what 15.5 M leave.
        cell_scale: 1: eq. 3; 2: LIIF, which counts in half pixels.
        activation: of the picture. "tanh": in [-1, 1] inside, as CoordFill, which the paper follows; "sigmoid": in
            [0, 1], as LaMa.
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
    activation: str = "tanh"

    def __post_init__(self):
        for name, values in CHOICES.items():
            value = getattr(self, name)
            require(value in values, name, f"be one of {', '.join(values)}", repr(value))
        require(self.channels, "channels", "not be empty", self.channels)
        require(self.down_kernel in (3, 4), "down_kernel", "be 3 or 4", self.down_kernel)
        for width in self.channels:
            both = 0 < int(width * self.ratio) < width
            require(both, "ratio", f"leave {width} channels a local and a global part", self.ratio)
            least = max(self.compress, self.squeeze)
            require(width >= least, "channels", f"be at least {least}, compress and squeeze", self.channels)
        require(self.channels[-1] % self.heads == 0, "heads", f"divide {self.channels[-1]} channels", self.heads)

    def grids(self, size):
        """The sizes of the encoder's maps for a picture of `size`, the largest first."""
        sizes = []
        for _ in self.channels:
            size = tuple((n + 2 - self.down_kernel) // 2 + 1 for n in size)
            sizes.append(size)
        return sizes

    @property
    def shortest(self):
        """The shortest side of a picture that the encoder's padding allows."""
        least = 2 if self.padding == "reflect" else 1
        return next(n for n in itertools.count(least) if self.grids((n, n))[-1][0] >= least)


SMALL = IN2Config(channels=(16, 32, 64), groups=1, blocks=2, heads=4, hidden=(64, 64, 64))


class IN2(nn.Module):
    """A picture without its holes, in three parts:

        encoder: [I (1 - M); M] -> maps of a half, a quarter and an eighth of the size, by `DownsampleProcessingBlock`
        body:    two groups of four `NeighborHybridAttentionBlock` on the smallest
        decoder: `ImplicitPyramidDecoder`, over the encoder's grids to the picture's own, or to any

    15,501,919 parameters. Nothing is padded or resized: the grids have the sizes that the encoder's maps have, and maps
    smaller than the attention's window are windows themselves. Everything runs in the parameters' dtype or autocast's,
    coordinates in float32.

    Args:
        config: an IN2Config.
        reference: the same network in plain PyTorch, without a kernel of this package: for doubt and benchmarks.

    Source: Zhao, Yang and Fu, Learning Position-Aware Implicit Neural Network for Real-World Face Inpainting, 2024.

    Example:
        >>> model = IN2(IN2Config(channels=(16, 16, 32), blocks=1, hidden=(32, 32))).eval()
        >>> image, mask = torch.rand(1, 3, 43, 59), torch.zeros(1, 1, 43, 59)
        >>> mask[..., 5:12, 8:20] = 1  # the hole
        >>> model(image, mask).shape
        torch.Size([1, 3, 43, 59])
    """

    def __init__(self, config=IN2Config(), *, reference=False):
        super().__init__()
        self.config, self.reference, self.notes = config, reference, {}
        channels, same = config.channels, {"reference": reference}
        pairs = itertools.pairwise((4, *channels))
        self.encoder = nn.ModuleList(DownsampleProcessingBlock(*pair, config, **same) for pair in pairs)
        groups = (NeighborHybridAttentionGroup(channels[-1], config, **same) for _ in range(config.groups))
        self.body = nn.Sequential(*groups)
        self.body_conv = Conv3x3(channels[-1], channels[-1], reference) if config.group_convs else None
        self.decoder = ImplicitPyramidDecoder(
            (*reversed(channels), channels[0]),
            hidden=config.hidden,
            mode=config.upsample,
            cell_scale=config.cell_scale,
            **same,
        )

    def forward(self, image, mask, size=None, *, scale=None, **options):
        """The picture [B, 3, H', W'] in image's dtype; without size and scale as large as the input.

        At the input's size it is M `predict` + (1 - M) I, and what is known (M = 0) the input's, bit for bit.

        Args:
            image: [B, 3, H, W] in [0, 1]; what it holds under the mask does not matter.
            mask: [B, 1, H, W], 1 = hole; what lies between fades the pixel.
            size: (H', W').
            scale: H' = round(scale H), W' = round(scale W) instead.
            options: of the last rendering: workspace in bytes; progress, called as progress(rows done, rows in all).

        Raises:
            TypeError: an argument is no floating-point tensor.
            ValueError: a shape or device that does not fit, a side that is too short.
        """
        out = self.predict(image, mask, output_size(image, size, scale), **options).to(image.dtype)
        if out.shape != image.shape:
            return out
        mask = mask.to(image.dtype).clamp(0, 1)
        return torch.where(mask == 0, image, known(image, mask) + mask * out)

    def predict(self, image, mask, size=None, **options):
        """What the network says of every pixel, known or not, in [0, 1]; arguments as `forward`."""
        feat, grids = self.encode(image, mask)
        return self.decode(feat, [*grids, image.shape[2:] if size is None else size], **options)

    def encode(self, image, mask):
        """The body's map [B, C, h, w], and the sizes of the encoder's larger maps, the smallest first."""
        parameter = self.decoder.head.weight
        require_tensor(image, "image", dims=(4,), like=parameter)
        rule = f"have shape [B, 3, H, W] with sides of at least {self.config.shortest}"
        fits = image.shape[1] == 3 and min(image.shape[2:]) >= self.config.shortest
        require(fits, "image", rule, shape(image))
        require_tensor(mask, "mask", dims=(4,), like=image)
        expected = [len(image), 1, *image.shape[2:]]
        require(shape(mask) == expected, "mask", f"have shape [B, 1, H, W] = {expected}", shape(mask))
        mask = mask.to(parameter.dtype).clamp(0, 1)
        image = image.to(parameter.dtype)
        x = torch.cat((known(image * 2 - 1 if self.config.activation == "tanh" else image, mask), mask), 1)
        maps = []
        for block in self.encoder:
            x = block(x)
            maps.append(x.shape[2:])
        out = self.body(x)
        if self.body_conv is not None:
            out = self.body_conv(out, add=x)
        return out, maps[-2::-1]

    def decode(self, feat, sizes, **options):
        """Colours [B, 3, H, W] in [0, 1] of `encode`'s map; sizes: `encode`'s, and (H, W)."""
        out = self.decoder(feat, sizes, **options)
        return (out.tanh() + 1) / 2 if self.config.activation == "tanh" else out.sigmoid()

    def inpaint(self, image, mask, size=None, **options):
        """`forward` without gradients."""
        with torch.no_grad():
            return self(image, mask, size, **options)

    def graphed(self, shape, size=None, *, scale=None, **options):
        """`forward` for images [B, 3, H, W] of one shape as a CUDA graph, to be called as (image, mask); `Graphed`
        says when it is captured, and when the plain forward runs instead: on a CPU always.

        Example:
            >>> model = IN2(IN2Config(channels=(16, 16, 32), blocks=1, hidden=(32, 32))).eval()
            >>> fast = model.graphed((1, 3, 32, 48))
            >>> with torch.no_grad():
            ...     fast(torch.rand(1, 3, 32, 48), torch.zeros(1, 1, 32, 48)).shape
            torch.Size([1, 3, 32, 48])
        """
        return graphed_pair(self, shape, size=size, scale=scale, **options)

    bytes_per_output_pixel = 108  # the nine taps of the head's three channels

    def bytes_per_pixel(self):
        """What `inpaint` needs for a pixel of the input, about, beside the workspace and the output."""
        values = 2.5 * self.config.channels[0] + 12  # the first maps; pictures, masks and their copies
        return round(values * max(4, self.decoder.head.weight.element_size()))

    def save(self, path, notes=None, dtype=None):
        """Writes safetensors: parameters (in `dtype`, if given), config and notes (JSON)."""
        checkpoints.save(self, path, notes or self.notes, dtype)

    @classmethod
    def from_checkpoint(cls, path, *, reference=False):
        """A model in eval mode from what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or holds something else; the message says what.
        """
        return checkpoints.load(path, "an IN2", lambda config: cls(IN2Config(**config), reference=reference))

    @classmethod
    def pretrained(cls):
        """The small model that ships with the package: 416 K parameters, in half precision on disk.

        Trained on photographs of scikit-image (`models/training/in2.py`; `notes` hold the recipe) for 24 minutes of one
        shared core, which is little. On the middle of its `coffee`, which it never saw, with strokes over 15 % of the
        pixels, the filled picture has a PSNR of 27.27 dB (27.61 at 253 x 381, which 8 does not divide); with the mean
        colour it has 20.83 (20.91), and OpenCV's method of Telea does better, 31.09 (30.80). Its strokes can be seen.
        At another size than the input's every pixel is the network's, and x2 has 17.39 dB: `DEAR` has 26.62.
        """
        return cls.from_checkpoint(PRETRAINED)
