"""LTE: an encoder, EDSR or RDN, in front of the local texture decoder; renders an image at any size."""

from dataclasses import dataclass
from typing import Any

import torch

from inr_kernels._core.checks import require
from inr_kernels.local_implicit import LocalTextureDecoder

from ..common import checkpoints
from ..common.progress import FUSED, parameters
from . import published
from .upscaler import Upscaler, check_encoder, encoder_depth, make_encoder

LARGEST_SCALE = 4  # that the published models were trained for


@dataclass(frozen=True)
class LTEConfig:
    """The structure of an LTE; the defaults are those of jaewon-lee-b/lte's EDSR-baseline model.

    Args:
        blocks, features, res_scale: of the encoder, see `EDSR`.
        hidden: widths of the decoder's hidden layers.
        hidden_dim: coefficients per pixel; even.
        encoder: "edsr" or "rdn".
        growth, convolutions: of an RDN, see `RDN`; it has no res_scale.

    Raises:
        ValueError: encoder is neither, there are no features, no blocks in an RDN, or hidden_dim is odd.
    """

    blocks: int = 16
    features: int = 64
    res_scale: float = 1.0
    hidden: tuple[int, ...] = (256, 256, 256)
    hidden_dim: int = 256
    encoder: str = "edsr"
    growth: int = 64
    convolutions: int = 8

    def __post_init__(self) -> None:
        check_encoder(self)
        fits = self.hidden_dim > 0 and self.hidden_dim % 2 == 0
        require(fits, "hidden_dim", "be positive and even", self.hidden_dim)

    @property
    def depth(self) -> int:
        """The number of repeated layers, each of which has tensors in the state dict."""
        return encoder_depth(self) + len(self.hidden)


class LTE(Upscaler, LocalTextureDecoder):
    """An image as a continuous function: features = encoder(image), rgb = decoder(features, coord, cell, image).

    `forward`, `gen_feat` and `query_rgb` are LTE's, on values in [-1, 1]; `upscale` takes and returns images in
    [0, 1]. The state dict has LTE's keys, `encoder.*`, `coef.*`, `freq.*`, `phase.*` and `imnet.*`.

    `from_checkpoint` also opens jaewon-lee-b/lte's .pth files of `lte` and `lte-fast` (LTE+) with the encoders
    `edsr-baseline`, `edsr` and `rdn`, not `swinir`, and their state dicts. No trained LTE ships with the package.

    Args:
        config: an LTEConfig.

    Source: Lee and Jin, Local Texture Estimator for Implicit Representation Function, CVPR 2022.

    Example:
        >>> model = LTE(LTEConfig(blocks=1, features=8, hidden=(16, 16), hidden_dim=16))
        >>> model.upscale(torch.rand(1, 3, 10, 12), scale=2.5).shape
        torch.Size([1, 3, 25, 30])
    """

    NETWORK = "LTE"
    ALIASES = ("lte-fast",)
    CONFIG = LTEConfig
    KEY = "phase.weight"
    READS = "jaewon-lee-b/lte's files, with EDSR or RDN encoders"

    def __init__(self, config: LTEConfig = LTEConfig()):
        super().__init__(config.features, hidden=config.hidden, hidden_dim=config.hidden_dim)
        self.encoder = make_encoder(config)
        self.config = config
        self.notes = {}
        self.feat = None
        self.inp: torch.Tensor | None = None

    def gen_feat(self, inp: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] in [-1, 1] -> features [B, C, h, w], which `query_rgb` then decodes."""
        self.inp = inp
        return super().gen_feat(inp)

    def query_rgb(self, coord: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        """coord, cell [B, Q, 2] -> [B, Q, 3], approximately in [-1, 1], from the features of the last `gen_feat`.

        coord [B, H, W, 2] and cell [B, 2], as in LTE+, give [B, H, W, 3].

        Raises:
            RuntimeError: gen_feat was not called.
        """
        if self.feat is None:
            raise RuntimeError("query_rgb needs features: call gen_feat first")
        return super().forward(self.feat, coord, cell, self.inp)

    def forward(  # type: ignore[override]
        self, inp: torch.Tensor, coord: torch.Tensor, cell: torch.Tensor
    ) -> torch.Tensor:
        """`gen_feat`, then `query_rgb`: inp [B, 3, h, w], coord, cell [B, Q, 2] -> [B, Q, 3]."""
        self.gen_feat(inp)
        return self.query_rgb(coord, cell)

    def _decode(
        self,
        feat: torch.Tensor,
        image: torch.Tensor,
        size: tuple[int, int],
        cell: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As LTE's evaluation: beyond the scales that it was trained for, the cell is that of the largest one."""
        if cell is None:
            own, least = (  # as tensors, because an exported graph leaves the sizes open
                torch.stack([feat.new_full((len(feat),), 2 / n, dtype=torch.float32) for n in sides], -1)
                for sides in (size, [LARGEST_SCALE * n for n in feat.shape[2:]])
            )
            cell = torch.maximum(own, least)
        return self.render(feat, size, cell, image, **options)

    def _decoder_work(self) -> float:
        return round(4 * parameters(self.imnet) / FUSED)

    @classmethod
    def _read(cls, contents: checkpoints.Contents) -> checkpoints.Checkpoint:
        return checkpoints.parse(contents, cls.NETWORK) or published.read_lte(contents, cls.KEY)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles do not contain the last image either
        return {**super().__getstate__(), "inp": None}
