"""DEAR: fills the missing pixels of an image and renders it at any size, in one pass."""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import inr_kernels
from inr_kernels import LocalImplicitDecoder
from inr_kernels._core import dispatch
from inr_kernels._core.checks import require
from inr_kernels.local_implicit.functional import WORKSPACE

from ..common.deprecated import eager_or_reference
from ..common.masking import known, output_size
from ..common.network import WEIGHTS, Inpainter
from ..common.progress import Progress, multiplications, parameters, shares
from ..common.smooth import at_least_float32, resized, smooth_fill
from ..common.tiling import map_tiles, pixels_with_halo
from . import eager as plain_pytorch
from .blocks import REACH, STRIDE, Encoder, encoder_input, enlarge, initialize
from .config import HIGH_PASS, DEARConfig

BANDS = 50  # of rows, in which the attention is computed where progress is shown


class DEARFeatures(NamedTuple):
    """The features of a DEAR, which `DEAR.encode` returns.

    Attributes:
        encoded: [F; E; W] [B, 2 C + 1, H, W], the map that the implicit function reads; without E or W if the config
            leaves them out.
        kernels: K [B, K², H, W], for `DEAR.reconstruct`; without `pim`, [B, 0, H, W].
        seen: what the encoders see, I (1 - M) or S [B, 3, H, W].
    """

    encoded: torch.Tensor
    kernels: torch.Tensor
    seen: torch.Tensor


class DEAR(Inpainter):
    """An image with missing pixels as a continuous function:

        Z = encoder([I (1 - M); M]),   L = filter_encoder([I (1 - M); M])
        F = ReLU(decoder(Z + K_hp * Z)),   K_hp = delta - softmax(filter_head(L))     one filter per value of Z
        E = softmax(((1 - M) F) F^T / sqrt(C)) F
        K = importance(L),   W = sigmoid(conv3x3(K)),   I_rec[p] = sum_q K_p[q] (I (1 - M))[p + q]
        rgb(x) = sum over the four pixels p around x of area_p MLP([F_p; E_p; W_p; x - p])

    With `fill="smooth"` the encoders see S instead of I (1 - M), and rgb(x) is S(x) plus the sum. ReLU on F and the
    sigmoid on W are additions to the paper (`feature_relu`, `importance_sigmoid`).

    21,962,206 parameters. The input may have any size: it is padded with missing pixels to multiples of 4, and to at
    least 12. Everything runs in the parameters' dtype or autocast's, coordinates in float32.

    `DEAR.pretrained()` has 772 K parameters, in half precision in the file. It was trained on sixteen photographs
    (`training/configs/dear_small.yaml`; `notes` name them and hold the recipe), which is little. PSNR on the middle of
    scikit-image's held-out `coffee` with strokes over 15 % of the pixels: at the input's size 32.34 dB (OpenCV's method
    of Telea: 31.09; the smooth fill that the network starts from: 31.86); x2 26.73 and x4 22.84 dB (bicubic
    interpolation of the smooth fill: 26.32 and 22.04). In the holes alone, on the mean of parts of 256 x 256 of four
    held-out photographs and three masks of each: 24.08 dB; the smooth fill has 23.23, Telea's method 22.62.

    Args:
        config: a DEARConfig.
        eager: the same network in plain PyTorch, without kernels of this package, for comparison.
        reference: deprecated alias of eager.

    Source: Zhang, Guo et al., SuperInpaint: Learning Detail-Enhanced Attentional Implicit Representation for
    Super-resolutional Image Inpainting, 2023; eq. 1-9.

    Example:
        >>> model = DEAR(SMALL)
        >>> image, mask = torch.rand(1, 3, 21, 30), torch.zeros(1, 21, 30, dtype=torch.bool)
        >>> mask[:, 5:12, 8:20] = True  # missing
        >>> model.inpaint(image, mask).shape, model.inpaint(image, mask, scale=2.5).shape
        (torch.Size([1, 3, 21, 30]), torch.Size([1, 3, 52, 75]))
    """

    NETWORK = "DEAR"
    CONFIG = DEARConfig
    KEY = "filter_head.weight"
    PRETRAINED = WEIGHTS / "dear_small.safetensors"
    bytes_per_output_pixel = 12  # the interpolated fill

    def __init__(
        self,
        config: DEARConfig = DEARConfig(),  # noqa: B008, it is frozen
        *,
        eager: bool = False,
        reference: bool | None = None,
    ):
        super().__init__()
        self.config, self.notes = config, {}
        self.eager = eager_or_reference(eager, reference)
        channels, features, taps = config.channels, config.features, config.importance_size**2
        self.encoder = Encoder(channels, config.blocks, config.norm)
        if config.dse or config.pim:
            self.filter_encoder = Encoder(channels, config.filter_blocks, config.norm)
        if config.dse:
            self.filter_head = nn.Conv2d(channels, channels * config.filter_size**2, 1)
        self.decoder = enlarge(channels, channels // 2, features)
        if config.pim:
            self.importance = enlarge(channels, features, taps)
            self.importance_head = nn.Conv2d(taps, 1, 3, padding=1)
        self.implicit = LocalImplicitDecoder(
            features + config.use * features + config.pim,
            hidden=config.hidden,
            feat_unfold=config.feat_unfold,
            cell_decode=config.cell_decode,
        )
        self._initialize()

    @torch.no_grad()
    def _initialize(self):
        """A new network starts from grey (or S), without a high-pass filter, and reconstructs its masked input."""
        grey = self.config.fill == "zeros"
        last = self.implicit.imnet.layers[-1]
        encoders = self._parts("encoder", "filter_encoder")
        others = self._parts("filter_head", "importance", "importance_head", "implicit")
        initialize(encoders, self.decoder, others)
        last.weight.mul_(0.1 if grey else 0)
        last.bias.fill_(0.5 if grey else 0)
        if self.config.pim:
            self.importance[-1].weight.mul_(0.1)
            self.importance[-1].bias[self.config.importance_size**2 // 2] = 1
        if self.config.dse:
            taps = self.config.filter_size**2
            self.filter_head.weight.mul_(0.1)
            self.filter_head.bias.view(-1, taps)[:, taps // 2] = 4

    def _parts(self, *names: str) -> list[Any]:
        """Those of these modules that the config has."""
        return [getattr(self, name) for name in names if hasattr(self, name)]

    @property
    def _ops(self) -> ModuleType:
        return plain_pytorch if self.eager else inr_kernels

    @property
    def _backend(self) -> str | None:
        return "reference" if self.eager else None

    def encode(self, image: torch.Tensor, mask: torch.Tensor, *, progress: Progress = None) -> DEARFeatures:
        """Returns `DEARFeatures` (encoded, kernels, seen); arguments and errors: as `Inpainter.encode`.

        progress: called as progress(done, total) while the attention E is computed, in bands of rows.
        """
        seen, mask = self._see(image, mask)
        return DEARFeatures(*self._encode(seen, mask, progress), seen)

    def _see(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """I (1 - M) or S, and M, in the parameters' dtype."""
        masked, mask = self._masked(image, mask)
        return (masked if self.config.fill == "zeros" else smooth_fill(masked, mask)), mask

    def _masked(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """I (1 - M) and M in the parameters' dtype."""
        dtype = next(self.parameters()).dtype
        mask = self._mask(image, mask).to(dtype)
        return known(image.to(dtype), mask), mask

    def _encode(
        self, seen: torch.Tensor, mask: torch.Tensor, progress: Progress = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config, (height, width) = self.config, seen.shape[2:]
        shortest = max(REACH + 1, config.filter_size // 2 + 1)
        padded = encoder_input(seen, mask, shortest, "constant" if config.fill == "zeros" else "replicate")
        latent = self.encoder(padded)
        guide: Any = self.filter_encoder(padded) if config.dse or config.pim else None
        if config.dse:
            latent = self._filter(latent, guide)
        feat = self.decoder(latent)[..., :height, :width]
        feat = feat.relu() if config.feature_relu else feat
        kernels, weights = feat[:, :0], []
        if config.pim:
            kernels = self.importance(guide)
            weight = self.importance_head(kernels)
            weights = [(weight.sigmoid() if config.importance_sigmoid else weight)[..., :height, :width]]
        attended = [self._attend(feat, mask.to(feat.dtype), progress)] if config.use else []  # last, for `progress`
        return torch.cat([feat, *attended, *weights], 1), kernels[..., :height, :width]

    def _attend(self, feat: torch.Tensor, mask: torch.Tensor, progress: Progress) -> torch.Tensor:
        """E [B, C, H, W]; with `progress`, in bands of rows."""
        options: dict[str, Any] = {"mask_keys": self.config.mask_keys}
        if progress is None or self.config.mask_keys or torch.is_grad_enabled() or not self._skips_masked(feat):
            out = self._ops.unmask_attention(feat, mask, **options)
            if progress is not None:
                progress(1, 1)
            return out
        feat, height = feat.contiguous(), feat.shape[2]
        out, step = torch.empty_like(feat), math.ceil(height / BANDS)
        for top in range(0, height, step):
            band = slice(top, top + step)
            only = torch.ones_like(mask)  # of a masked pixel nothing is computed
            only[:, :, band] = mask[:, :, band]
            out[:, :, band] = self._ops.unmask_attention(feat, only, **options)[:, :, band]
            progress(min(top + step, height), height)
        return out

    def _skips_masked(self, feat: torch.Tensor) -> bool:
        """Whether attention computes nothing of masked pixels: so do the kernels, while the reference computes them."""
        backend = dispatch.requested_backend(None)
        facts = dispatch.Facts(feat.device, feat.dtype)
        return not self.eager and (backend or dispatch.OPS["unmask_attention"].default(facts)) != "reference"

    def _filter(self, latent: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        """Z + K_hp * Z."""
        config = self.config
        alpha, beta, gamma = HIGH_PASS[config.high_pass]
        return self._ops.elementwise_filter(
            latent,
            self.filter_head(guide),
            kernel_size=config.filter_size,
            padding=config.padding,
            normalize=config.softmax,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
        )

    def _encode_tiles(
        self, seen: torch.Tensor, mask: torch.Tensor, side: int, progress: Progress = None
    ) -> torch.Tensor:
        """`encode`'s map, from tiles with half a side of their surroundings."""
        return map_tiles(lambda *part: self._encode(*part)[0], seen, mask, side=side, halo=side // 2, progress=progress)

    def reconstruct(self, image: torch.Tensor, mask: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """I_rec [B, 3, H, W] of eq. 8: every pixel of the masked image from its neighbours, by `encode`'s kernels.

        Raises:
            ValueError: the config has no `pim`.
        """
        require(self.config.pim, "pim", "be True in the config to reconstruct", self.config.pim)
        masked, _ = self._masked(image, mask)
        return self._ops.pixelwise_reconstruct(masked.to(kernels.dtype), kernels)

    def query(
        self, image: torch.Tensor, mask: torch.Tensor, coord: torch.Tensor, cell: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the colours [B, Q, 3] at some coordinates.

        Args:
            image, mask: as `encode`.
            coord: [B, Q, 2], (y, x) in [-1, 1].
            cell: the size of a query in the units of coord, [B, 2] or [B, Q, 2]; required with `cell_decode`.
        """
        encoded, _, seen = self.encode(image, mask)
        return self.decode_at(encoded, seen, coord, cell)

    def decode_at(
        self, encoded: torch.Tensor, seen: torch.Tensor, coord: torch.Tensor, cell: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns `query`'s colours from the tensors `encoded` and `seen` of `encode`."""
        colour = self.implicit(encoded, coord, cell, backend=self._backend)
        if self.config.fill == "zeros":
            return colour
        image = at_least_float32(seen)
        grid = coord.to(image.dtype).flip(-1)[:, None]  # (x, y)
        start = F.grid_sample(image, grid, mode="bicubic", padding_mode="border", align_corners=False)
        return colour + start[:, :, 0].transpose(1, 2).to(colour.dtype)

    def decode(
        self,
        features: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
        size: tuple[int, int],
        *,
        workspace: int = WORKSPACE,
        progress: Progress = None,
    ) -> torch.Tensor:
        """As `Inpainter.decode`, from `DEARFeatures` or a plain tuple (encoded, kernels, seen); kernels is not read."""
        encoded, _, seen = features
        options: dict[str, Any] = {"workspace": workspace, "progress": progress, "backend": self._backend}
        out = self.implicit.render(encoded, size, **options)
        if self.config.fill == "zeros":
            return out
        return out + resized(seen, size).to(out.dtype)

    def predict(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        size: tuple[int, int] | None = None,
        *,
        scale: float | None = None,
        tile: int | None = None,
        progress: Progress = None,
        **options: Any,
    ) -> torch.Tensor:
        """As `Inpainter.predict`, optionally encoded in tiles.

        Args:
            tile: side of the tiles in pixels, each of which is encoded with half a side of its surroundings. The time
                is then proportional to the number of pixels instead of its square, but a pixel attends to its
                surroundings only, which changes the result. None: encode the whole image at once. A config with
                instance norm, whose statistics are those of the whole image, takes no other value.

        Raises:
            TypeError, ValueError: as `Inpainter.predict`; ValueError also for a tile that the config does not take.
        """
        size = output_size(image, size, scale)
        require(tile is None or tile > 0, "tile", "be positive", tile)
        require(tile is None or self.can_tile, "tile", "be None in a config with instance norm", tile)
        if tile is None:
            return super().predict(image, mask, size, progress=progress, **options)
        encoding = decoding = None
        if progress is not None:
            convolutions, attention, rendering = self._work(image, size, tile)
            encoding, decoding = shares(progress, convolutions + attention, rendering)
        seen, mask = self._see(image, mask)
        encoded = self._encode_tiles(seen, mask, tile, encoding)
        return self.decode((encoded, None, seen), size, progress=decoding, **options)

    @property
    def can_tile(self) -> bool:
        """Whether `predict` takes tiles: not with instance norm."""
        return self.config.norm == "none"

    def _work(self, image: torch.Tensor, size: tuple[int, int], tile: int | None = None) -> tuple[float, float, float]:
        """Multiplications, those of the attention in the middle; most convolutions run at the latent's size."""
        height, width = image.shape[2:]
        pixels = keys = height * width
        if tile:
            pixels, keys = pixels_with_halo((height, width), tile, tile // 2), min(keys, (2 * tile) ** 2)
        attention = 2 * self.config.features * keys * self.config.use
        convolutions = (parameters(self) - parameters(self.implicit)) / STRIDE**2
        rendering = math.prod(size) * multiplications(self.implicit)
        return len(image) * pixels * convolutions, len(image) * pixels * attention, len(image) * rendering

    def _encoding_modules(self) -> list[tuple[nn.Module, float]]:
        """With multiplications for a pixel of the latent, which is smaller than the maps of some layers."""
        parts = self._parts("encoder", "filter_encoder"), [self.decoder, *self._parts("importance")]
        encoders = [(layer, 16 >> min(i, 4)) for part in parts[0] for i, layer in enumerate(part)]
        decoders = [(layer, 1 << i) for part in parts[1] for i, layer in enumerate(part)]
        layers = [*encoders, *decoders, *((head, 16) for head in self._parts("importance_head"))]
        return [(layer, factor * parameters(layer)) for layer, factor in layers if parameters(layer)]

    def bytes_per_pixel(self, tile: int | None = None) -> int:
        """Estimates the memory that `inpaint` needs for a pixel of the input, in addition to workspace and output."""
        config = self.config
        if tile:  # twice the encoded map; the tiles, approximately
            return round((4 * config.features + 2) * next(self.parameters()).element_size()) + 150
        latent = config.channels / STRIDE**2 * (config.filter_size**2 + 4)  # the filters and their inputs
        values = config.channels + latent + 6 * config.features
        return round(values * next(self.parameters()).element_size())
