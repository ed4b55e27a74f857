"""LIIF: an encoder, EDSR or RDN, in front of the local implicit decoder; renders an image at any size."""

from dataclasses import dataclass
from typing import Any

import torch

from inr_kernels.local_implicit import LocalImplicitDecoder

from ..common import checkpoints
from ..common.network import WEIGHTS
from ..common.progress import multiplications
from . import published
from .upscaler import Upscaler, check_encoder, encoder_depth, make_encoder


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
        check_encoder(self)

    @property
    def depth(self) -> int:
        """The number of repeated layers, each of which has tensors in the state dict."""
        return encoder_depth(self) + len(self.hidden)


SMALL = LIIFConfig(blocks=8, features=32, hidden=(128, 128, 128))


class LIIF(Upscaler, LocalImplicitDecoder):
    """An image as a continuous function: features = encoder(image), rgb = decoder(features, coord, cell).

    `forward`, `gen_feat` and `query_rgb` are LIIF's, on values in [-1, 1]; `upscale` takes and returns images in
    [0, 1]. The state dict has LIIF's keys, `encoder.*` and `imnet.*`. LIIF has no `eager` option.

    `from_checkpoint` also opens yinboc/liif's .pth files with the encoders `edsr-baseline`, `edsr` and `rdn`, and state
    dicts of `LIIFEDSRNet` and `LIIFRDNNet` of mmagic, alone or as the file's `state_dict`. A state dict does not say
    everything: its decoder is taken to have a local ensemble, its residual blocks a factor of 1, or of 0.1 if there are
    32 of 256 features, as in the published models.

    `LIIF.pretrained()` has 229 K parameters, 8 blocks of 32 features. It was trained on nine photographs of
    scikit-image (`training/configs/liif_small.yaml`, 7000 steps; `notes` list them). PSNR on scikit-image's held-out
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
        self.encoder = make_encoder(config)
        self.config = config
        self.notes = {}
        self.feat = None

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

    def _decode(self, feat: torch.Tensor, image: torch.Tensor, size: tuple[int, int], **options: Any) -> torch.Tensor:
        return self.render(feat, size, **options)

    def _decoder_work(self) -> float:
        return multiplications(self)

    @classmethod
    def _read(cls, contents: checkpoints.Contents) -> checkpoints.Checkpoint:
        return checkpoints.parse(contents, cls.NETWORK) or published.read(contents, cls.KEY)
