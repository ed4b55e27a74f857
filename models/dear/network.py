"""DEAR: fills the holes of a picture and renders it at any size, in one pass."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import inr_kernels
from inr_kernels import LocalImplicitDecoder
from inr_kernels._core.checks import require, require_tensor, shape
from inr_kernels.local_implicit.functional import WORKSPACE

from ..common import checkpoints
from ..common.graphs import graphed_pair
from ..common.masking import known, output_size
from . import eager as dear_reference
from .blocks import REACH, STRIDE, Encoder, encoder_input, enlarge, initialize, smooth_fill

PRETRAINED = Path(__file__).parents[1] / "weights" / "dear_small.safetensors"
# alpha, beta, gamma of `elementwise_filter`, so that it gives Z + K_hp * Z.
HIGH_PASS = {"delta": (2, 0, -1), "ones": (1, 1, -1)}
CHOICES = {
    "fill": ("zeros", "smooth"),
    "norm": ("instance", "none"),
    "high_pass": tuple(HIGH_PASS),
    "softmax": ("taps", "all"),
    "padding": ("reflect", "replicate", "zeros"),
}


@dataclass(frozen=True)
class DEARConfig:
    """What fixes a DEAR. The paper leaves much open; the defaults follow its first author's code of before (MISF,
    CVPR 2022) and after (SAIR, ECCV 2024), where the paper does not speak against it.

    Args:
        channels: of the latent Z. 256: both codes. A quarter and a half of them before the two strides.
        features: of F and E, and between the two convolutions of the importance branch. 64: both codes.
        blocks: ResNet blocks of the encoder. 8: the paper.
        filter_blocks: of the filter branch, an encoder "of similar architecture". 8: as the encoder.
        fill: of the holes, before all. "zeros": the paper; "smooth": a smooth continuation of the surroundings S, to
            whose bicubic interpolation the implicit function then adds, so that a short training is enough.
        norm: "instance" in the ResNet blocks alone, as SAIR, or "none": before the decoder it would remove what
            the literal high-pass amplifies.
        filter_size: K_z of the high-pass filters. 3: all code of the group.
        high_pass: "delta", delta - softmax, which removes the mean, as the filters that the paper cites; "ones",
            its literal 1 - softmax, whose taps sum to K_z² - 1.
        softmax: over the "taps" of each filter: positive, of sum one; or over "all" channels, the other reading.
        padding: of the filtered latent. "reflect": constants stay constant at the border; "zeros": MISF.
        importance_size: K of the kernels that rebuild a pixel from its neighbours. 3: MISF's on pictures.
        mask_keys: whether attention also leaves out the holes' keys. False: eq. 7; True: its prose.
        hidden: widths of the implicit function's hidden layers. Four of 256: the paper's "four-layer MLP with 256
            latent dimensions", counted as SAIR does.
        feat_unfold: whether it sees a 3 x 3 neighbourhood. False: eq. 1 lists one pixel.
        cell_decode: whether it sees the size of an output pixel. False: eq. 1 lists none.
    """

    channels: int = 256
    features: int = 64
    blocks: int = 8
    filter_blocks: int = 8
    fill: str = "zeros"
    norm: str = "instance"
    filter_size: int = 3
    high_pass: str = "delta"
    softmax: str = "taps"
    padding: str = "reflect"
    importance_size: int = 3
    mask_keys: bool = False
    hidden: tuple[int, ...] = (256, 256, 256, 256)
    feat_unfold: bool = False
    cell_decode: bool = False

    def __post_init__(self):
        for name, values in CHOICES.items():
            value = getattr(self, name)
            require(value in values, name, f"be one of {', '.join(values)}", repr(value))
        fits = self.channels > 0 and self.channels % 4 == 0
        require(fits, "channels", "be a positive multiple of 4", self.channels)
        for name in ("filter_size", "importance_size"):
            side = getattr(self, name)
            require(side > 0 and side % 2 == 1, name, "be odd and positive", side)


SMALL = DEARConfig(
    channels=64, features=32, blocks=6, filter_blocks=1, fill="smooth", norm="none", hidden=(128, 128, 128)
)


class DEAR(nn.Module):
    """A picture with holes as a continuous function:

        Z = encoder([I (1 - M); M]),   L = filter_encoder([I (1 - M); M])
        F = ReLU(decoder(Z + K_hp * Z)),   K_hp = delta - softmax(filter_head(L))     one filter a value of Z
        E = softmax(((1 - M) F) F^T / sqrt(C)) F
        K = importance(L),   W = sigmoid(conv3x3(K)),   I_rec[p] = sum_q K_p[q] (I (1 - M))[p + q]
        rgb(x) = sum over the four pixels p around x of area_p MLP([F_p; E_p; W_p; x - p])

    With `fill="smooth"` the encoders see S instead of I (1 - M), and rgb(x) is S(x) + the sum.

    21,962,206 parameters. The input may have any size: up to multiples of 4 (and 12 pixels) it continues as a hole.
    Everything runs in the parameters' dtype or autocast's, coordinates in float32.

    Args:
        config: a DEARConfig.
        reference: the same network in plain PyTorch, without a kernel of this package: for doubt and benchmarks.

    Source: Guo et al., SuperInpaint: Learning Detail-Enhanced Attentional Implicit Representation for
    Super-resolutional Image Inpainting, 2023; eq. 1-9.

    Example:
        >>> model = DEAR(SMALL)
        >>> image, mask = torch.rand(1, 3, 21, 30), torch.zeros(1, 1, 21, 30)
        >>> mask[..., 5:12, 8:20] = 1  # the hole
        >>> model(image, mask, scale=2.5).shape
        torch.Size([1, 3, 52, 75])
    """

    def __init__(self, config=DEARConfig(), *, reference=False):
        super().__init__()
        self.config, self.reference, self.notes = config, reference, {}
        channels, features, taps = config.channels, config.features, config.importance_size**2
        self.encoder = Encoder(channels, config.blocks, config.norm)
        self.filter_encoder = Encoder(channels, config.filter_blocks, config.norm)
        self.filter_head = nn.Conv2d(channels, channels * config.filter_size**2, 1)
        self.decoder = enlarge(channels, channels // 2, features)
        self.importance = enlarge(channels, features, taps)
        self.importance_head = nn.Conv2d(taps, 1, 3, padding=1)
        self.implicit = LocalImplicitDecoder(
            2 * features + 1,
            hidden=config.hidden,
            feat_unfold=config.feat_unfold,
            cell_decode=config.cell_decode,
        )
        self._initialize()

    @torch.no_grad()
    def _initialize(self):
        """A fresh network starts from grey (or from S), from no high-pass, and from the picture rebuilt as it is."""
        grey = self.config.fill == "zeros"
        last = self.implicit.imnet.layers[-1]
        others = [self.filter_head, self.importance, self.importance_head, self.implicit]
        initialize([self.encoder, self.filter_encoder], self.decoder, others)
        for layer, gain in ((self.filter_head, 0.1), (self.importance[-1], 0.1), (last, 0.1 if grey else 0)):
            layer.weight.mul_(gain)
        last.bias.fill_(0.5 if grey else 0)
        self.importance[-1].bias[self.config.importance_size**2 // 2] = 1
        taps = self.config.filter_size**2
        self.filter_head.bias.view(-1, taps)[:, taps // 2] = 4

    @property
    def _ops(self):
        return dear_reference if self.reference else inr_kernels

    def encode(self, image, mask):
        """The map that the implicit function reads, [F; E; W] [B, 2 C + 1, H, W], the kernels K [B, K², H, W], and
        what the encoders see, I (1 - M) or S [B, 3, H, W].

        Args:
            image: [B, 3, H, W] in [0, 1]; what it holds under the mask does not matter.
            mask: [B, 1, H, W], 1 = hole; what lies between fades the pixel.

        Raises:
            TypeError: an argument is no floating-point tensor.
            ValueError: a shape or device that does not fit.
        """
        seen, mask = self._see(image, mask)
        return *self._encode(seen, mask), seen

    def _see(self, image, mask):
        seen, mask = self._masked(image, mask)
        return (seen if self.config.fill == "zeros" else smooth_fill(seen, mask)), mask

    def _encode(self, seen, mask):
        config, (height, width) = self.config, seen.shape[2:]
        shortest = max(REACH + 1, config.filter_size // 2 + 1)
        padded = encoder_input(seen, mask, shortest, "constant" if config.fill == "zeros" else "replicate")
        latent, guide = self.encoder(padded), self.filter_encoder(padded)
        alpha, beta, gamma = HIGH_PASS[config.high_pass]
        latent = self._ops.elementwise_filter(
            latent,
            self.filter_head(guide),
            kernel_size=config.filter_size,
            padding=config.padding,
            normalize=config.softmax,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
        )
        feat = self.decoder(latent).relu()[..., :height, :width]
        kernels = self.importance(guide)
        weight = self.importance_head(kernels).sigmoid()[..., :height, :width]
        attended = self._ops.unmask_attention(feat, mask.to(feat.dtype), mask_keys=config.mask_keys)
        return torch.cat([feat, attended, weight], 1), kernels[..., :height, :width]

    def _encode_tiles(self, seen, mask, side):
        """`encode`'s map, from tiles that overlap by half a side at each of theirs."""
        rows = []
        for top in range(0, seen.shape[2], side):
            row = []
            for left in range(0, seen.shape[3], side):
                y, x = max(top - side // 2, 0), max(left - side // 2, 0)
                around = (..., slice(y, top + side + side // 2), slice(x, left + side + side // 2))
                encoded, _ = self._encode(seen[around], mask[around])
                row.append(encoded[..., top - y : top - y + side, left - x : left - x + side])
            rows.append(torch.cat(row, 3))
        return torch.cat(rows, 2)

    def reconstruct(self, image, mask, kernels):
        """I_rec [B, 3, H, W] of eq. 8: every pixel of the masked picture from its neighbours, by encode's kernels."""
        masked, _ = self._masked(image, mask)
        return self._ops.pixelwise_reconstruct(masked.to(kernels.dtype), kernels)

    def query(self, image, mask, coord, cell=None):
        """Colours [B, Q, 3] at coord [B, Q, 2], (y, x) in [-1, 1]; cell [B, 2] or like coord with `cell_decode`."""
        encoded, _, seen = self.encode(image, mask)
        return self.decode(encoded, seen, coord, cell)

    def decode(self, encoded, seen, coord, cell=None):
        """`query` on a map and a picture that `encode` gave."""
        colour = self.implicit(encoded, coord, cell, backend=self._backend)
        if self.config.fill == "zeros":
            return colour
        wide = _at_least_float32(seen)
        grid = coord.to(wide.dtype).flip(-1)[:, None]  # (x, y)
        start = F.grid_sample(wide, grid, mode="bicubic", padding_mode="border", align_corners=False)
        return colour + start[:, :, 0].transpose(1, 2).to(colour.dtype)

    def forward(self, image, mask, size=None, *, scale=None, tile=None, workspace=WORKSPACE, progress=None):
        """The whole picture [B, 3, H', W'], unclipped; without size and scale as large as the input.

        Args:
            image, mask: as `encode`.
            size: (H', W').
            scale: H' = round(scale H), W' = round(scale W) instead.
            tile: as `inpaint`.
            workspace: bytes that the implicit function may use, at any size.
            progress: called as progress(rows done, rows in all).
        """
        size = output_size(image, size, scale)
        require(tile is None or tile > 0, "tile", "be positive", tile)
        seen, mask = self._see(image, mask)
        encoded = self._encode_tiles(seen, mask, tile) if tile else self._encode(seen, mask)[0]
        options = {"workspace": workspace, "progress": progress, "backend": self._backend}
        out = self.implicit.render(encoded, size, **options)
        if self.config.fill == "zeros":
            return out
        return out + F.interpolate(_at_least_float32(seen), size, mode="bicubic").to(out.dtype)

    @torch.no_grad()
    def inpaint(self, image, mask, size=None, *, tile=None, **options):
        """`forward` in [0, 1]; at the input's size the known pixels (mask 0) are the input's own.

        tile: encode squares of so many pixels, with half as many around them, one by one: time in proportion to
            the pixels instead of their square. A pixel then attends to its surroundings alone, and the result is
            another. None: the whole at once.
        """
        out = self(image, mask, size, tile=tile, **options).clamp_(0, 1)
        return torch.where(mask == 0, image, out.to(image.dtype)) if out.shape == image.shape else out

    def graphed(self, shape, size=None, *, scale=None, **options):
        """`forward` for images [B, 3, H, W] of one shape as a CUDA graph, to be called as (image, mask); `Graphed`
        says when it is captured, and when the plain forward runs instead: on a CPU always.
        """
        return graphed_pair(self, shape, size=size, scale=scale, **options)

    bytes_per_output_pixel = 12  # the interpolated fill

    def bytes_per_pixel(self, tile=None):
        """What `inpaint` needs for a pixel of the input, about, beside the workspace and the output."""
        config = self.config
        if tile:  # what the implicit function reads, and once more on its way to the whole; the tiles, more or less
            return round((4 * config.features + 2) * self.filter_head.weight.element_size()) + 150
        latent = config.channels / STRIDE**2 * (config.filter_size**2 + 4)  # the filters, and what is around them
        values = config.channels + latent + 6 * config.features
        return round(values * self.filter_head.weight.element_size())

    @property
    def _backend(self):
        return "reference" if self.reference else None

    def _masked(self, image, mask):
        """I (1 - M) and M in the parameters' dtype."""
        require_tensor(image, "image", dims=(4,))
        fits = image.shape[1] == 3 and min(image.shape[2:]) > 0
        require(fits, "image", "have shape [B, 3, H, W] with at least one pixel", shape(image))
        require_tensor(mask, "mask", dims=(4,), like=image)
        expected = [len(image), 1, *image.shape[2:]]
        require(shape(mask) == expected, "mask", f"have shape [B, 1, H, W] = {expected}", shape(mask))
        dtype = self.filter_head.weight.dtype
        mask = mask.to(dtype).clamp(0, 1)
        return known(image.to(dtype), mask), mask

    def save(self, path, notes=None, dtype=None):
        """Writes safetensors: parameters (in `dtype`, if given), config and notes (JSON)."""
        checkpoints.save(self, path, notes or self.notes, dtype)

    @classmethod
    def from_checkpoint(cls, path, *, reference=False):
        """A model in eval mode, its parameters in float32, from what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or holds something else; the message says what.
        """
        return checkpoints.load(path, "a DEAR", lambda config: cls(DEARConfig(**config), reference=reference))

    @classmethod
    def pretrained(cls):
        """The small model that ships with the package: 772 K parameters, in half precision on disk.

        Trained on photographs of scikit-image (`models/training/dear.py`; `notes` hold the recipe), which is little. On
        the middle of its `coffee`, which it never saw, with strokes over 15 % of the pixels, PSNR: at the input's size
        31.75 dB, OpenCV's method of Telea 31.09; x2 26.62 and x4 21.78 dB, the bicubic interpolation of the picture
        whose holes have the mean colour 20.17 and 18.34. What it learned is to sharpen: around the holes it gains 0.7
        dB at x2 and 0.4 at x4 on the interpolation that it starts from; in them it loses 0.1 at x1 and 0.5 at x4 to
        the smooth fill, which alone has 31.86, 26.32 and 22.04 dB.
        """
        return cls.from_checkpoint(PRETRAINED)


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dear_loss(rgb, target, reconstruction, image):
    """L1 of the queried colours + 0.01 L1 of the rebuilt input (eq. 10).

    Args:
        rgb, target: colours of the queries, or pictures, of one shape.
        reconstruction, image: `DEAR.reconstruct`'s picture, and the input without holes.
    """
    return F.l1_loss(rgb, target) + 0.01 * F.l1_loss(reconstruction, image)


def sample_queries(picture, count, generator=None):
    """Random pixels of a picture [B, 3, H, W] as queries: coord [B, count, 2], cell [B, 2], rgb [B, count, 3]."""
    batch, _, height, width = picture.shape
    size = torch.tensor([height, width])
    pixels = (torch.rand(batch, count, 2, generator=generator) * size).long().to(picture.device)
    rgb = picture[torch.arange(batch, device=picture.device)[:, None], :, pixels[..., 0], pixels[..., 1]]
    size = size.to(picture.device)
    return (2 * pixels + 1) / size - 1, (2 / size).expand(batch, 2), rgb
