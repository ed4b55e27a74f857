"""LIIF: an encoder, EDSR or RDN, in front of the local implicit decoder; renders an image at any size."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from inr_kernels._core.checks import require
from inr_kernels.local_implicit import LocalImplicitDecoder
from inr_kernels.local_implicit.functional import WORKSPACE

from ..common import checkpoints
from ..common.masking import check_image, check_range, check_weights, output_size
from ..common.network import WEIGHTS, Network
from ..common.progress import Progress, multiplications, parameters, shares
from . import published
from .edsr import EDSR
from .rdn import RDN

ENCODERS = ("edsr", "rdn")


@dataclass(frozen=True)
class LIIFConfig:
    """The structure of a LIIF; the defaults are those of yinboc/liif's EDSR-baseline model.

    Args:
        blocks, features, res_scale: of the encoder, see `EDSR`.
        hidden: widths of the decoder's hidden layers.
        local_ensemble, feat_unfold, cell_decode: LIIF's flags.
        encoder: "edsr" or "rdn".
        growth, convolutions: of an RDN, see `RDN`; it has no res_scale.

    Raises:
        ValueError: encoder is neither, or there are no features, or no blocks in an RDN.
    """

    blocks: int = 16
    features: int = 64
    res_scale: float = 1.0
    hidden: tuple[int, ...] = (256, 256, 256, 256)
    local_ensemble: bool = True
    feat_unfold: bool = True
    cell_decode: bool = True
    encoder: str = "edsr"
    growth: int = 64
    convolutions: int = 8

    def __post_init__(self) -> None:
        require(self.encoder in ENCODERS, "encoder", f"be one of {', '.join(ENCODERS)}", repr(self.encoder))
        require(self.features > 0, "features", "be positive", self.features)
        require(self.blocks > 0 or self.encoder != "rdn", "blocks", "be positive in an RDN", self.blocks)

    @property
    def depth(self) -> int:
        """The number of repeated layers, each of which has tensors in the state dict."""
        return self.blocks * (self.convolutions if self.encoder == "rdn" else 1) + len(self.hidden)


SMALL = LIIFConfig(blocks=8, features=32, hidden=(128, 128, 128))


class LIIF(Network, LocalImplicitDecoder):
    """An image as a continuous function: features = encoder(image), rgb = decoder(features, coord, cell).

    `forward`, `gen_feat` and `query_rgb` are LIIF's, on values in [-1, 1]; `upscale` takes and returns images in
    [0, 1]. The state dict has LIIF's keys, `encoder.*` and `imnet.*`. LIIF has no `eager` option.

    `from_checkpoint` also opens yinboc/liif's .pth files with the encoders `edsr-baseline`, `edsr` and `rdn`, and state
    dicts of `LIIFEDSRNet` and `LIIFRDNNet` of mmagic, alone or as the file's `state_dict`. A state dict does not say
    everything: its decoder is taken to have a local ensemble, its residual blocks a factor of 1, or of 0.1 if there are
    32 of 256 features, as in the published models.

    `LIIF.pretrained()` has 229 K parameters, 8 blocks of 32 features. It was trained on nine photographs of
    scikit-image (`models/training/liif.py`, 7000 steps; `notes` hold the list). PSNR on scikit-image's held-out
    `coffee`, against bicubic interpolation: x2 30.99 and 29.09 dB, x2.7 28.82 and 27.42 dB, x3.7 27.25 and 26.10 dB.

    Args:
        config: a LIIFConfig.

    Source: Chen, Liu and Wang, Learning Continuous Image Representation with Local Implicit Image
    Function, CVPR 2021.

    Example:
        >>> model = LIIF(SMALL)
        >>> model.upscale(torch.rand(1, 3, 10, 12), scale=2.5).shape
        torch.Size([1, 3, 25, 30])
    """

    NETWORK = "LIIF"
    CONFIG = LIIFConfig
    KEY = "imnet.layers.0.weight"
    PRETRAINED = WEIGHTS / "liif_small.safetensors"
    READS = "yinboc/liif's and mmagic's .pth"

    def __init__(self, config: LIIFConfig = LIIFConfig()):
        super().__init__(
            config.features,
            hidden=config.hidden,
            feat_unfold=config.feat_unfold,
            local_ensemble=config.local_ensemble,
            cell_decode=config.cell_decode,
        )
        self.encoder: EDSR | RDN
        if config.encoder == "rdn":
            self.encoder = RDN(config.blocks, config.features, config.growth, config.convolutions)
        else:
            self.encoder = EDSR(config.blocks, config.features, config.res_scale)
        self.config = config
        self.notes = {}
        self.feat: torch.Tensor | None = None

    def gen_feat(self, inp: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] in [-1, 1] -> features [B, C, h, w], which `query_rgb` then decodes."""
        self.feat = self.encoder(inp)
        return self.feat

    def query_rgb(self, coord: torch.Tensor, cell: torch.Tensor | None = None) -> torch.Tensor:
        """coord, cell [B, Q, 2] -> [B, Q, 3], approximately in [-1, 1], from the features of the last `gen_feat`.

        Raises:
            RuntimeError: gen_feat was not called.
        """
        if self.feat is None:
            raise RuntimeError("query_rgb needs features: call gen_feat first")
        return super().forward(self.feat, coord, cell)

    def forward(  # type: ignore[override]
        self, inp: torch.Tensor, coord: torch.Tensor, cell: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`gen_feat`, then `query_rgb`: inp [B, 3, h, w], coord, cell [B, Q, 2] -> [B, Q, 3]."""
        self.gen_feat(inp)
        return self.query_rgb(coord, cell)

    @torch.no_grad()
    def upscale(
        self,
        image: torch.Tensor,
        scale: float | None = None,
        *,
        size: tuple[int, int] | None = None,
        workspace: int = WORKSPACE,
        progress: Progress = None,
        **options: Any,
    ) -> torch.Tensor:
        """Renders an image [B, 3, h, w] in [0, 1] at another size: [B, 3, H, W] in [0, 1], in the image's dtype.

        In addition to both images it needs the features (4 C bytes per pixel of the input in float32) and approximately
        `workspace` bytes, at any size: the encoder runs on overlapping tiles, the decoder on bands of rows.

        Args:
            image: [B, 3, h, w].
            scale: H = round(scale h), W = round(scale w); the network was trained for 1 to 4.
            size: (H, W), instead of scale.
            workspace: bytes.
            progress: called as progress(done, total) while encoding and decoding, see `common.progress`.
            options: of `LocalImplicitDecoder.render`: cell, backend.

        Raises:
            TypeError: image is not a floating-point tensor.
            ValueError: a shape, size, scale or device that does not fit; values that are not in [0, 1], such as
                0 ... 255; weights that hold NaN.
        """
        if (scale is None) == (size is None):
            raise ValueError(f"give either scale or size; got scale={scale}, size={size}")
        parameter = next(self.parameters())
        check_image(image, parameter.device)
        check_range(image)
        size = output_size(image, size, scale)
        encoding = decoding = None
        if progress is not None:
            of_encoder = parameters(self.encoder) * self.encoder.tiled_pixels(image, workspace)
            of_decoder = multiplications(self) * len(image) * math.prod(size)
            encoding, decoding = shares(progress, of_encoder, of_decoder)
        feat = self.encoder.tiled(image.to(parameter.dtype) * 2 - 1, workspace, encoding)
        out = self.render(feat, size, workspace=workspace, progress=decoding, **options)
        check_weights(self, out)
        return out.add_(1).div_(2).clamp_(0, 1).to(image.dtype)

    @classmethod
    def _read(cls, contents: checkpoints.Contents) -> checkpoints.Checkpoint:
        return checkpoints.parse(contents, cls.NETWORK) or published.read(contents, cls.KEY)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles do not contain the last features
        return {**self.__dict__, "feat": None}
