"""What LIIF and LTE share: their encoders, and rendering an image at any size."""

import math
from typing import Any

import torch
from torch import nn

from inr_kernels._core.checks import require
from inr_kernels.local_implicit.functional import WORKSPACE

from ..common.masking import check_image, check_range, check_weights, output_size
from ..common.network import Network
from ..common.progress import Progress, parameters, shares
from .edsr import EDSR
from .rdn import RDN

ENCODERS = ("edsr", "rdn")


def check_encoder(config: Any) -> None:
    """Raises unless a config's encoder, features and blocks fit."""
    require(config.encoder in ENCODERS, "encoder", f"be one of {', '.join(ENCODERS)}", repr(config.encoder))
    require(config.features > 0, "features", "be positive", config.features)
    require(config.blocks > 0 or config.encoder != "rdn", "blocks", "be positive in an RDN", config.blocks)


def encoder_depth(config: Any) -> int:
    """The number of repeated layers of the encoder, each of which has tensors in the state dict."""
    return config.blocks * (config.convolutions if config.encoder == "rdn" else 1)


def make_encoder(config: Any) -> EDSR | RDN:
    """The encoder of a config."""
    if config.encoder == "rdn":
        return RDN(config.blocks, config.features, config.growth, config.convolutions)
    return EDSR(config.blocks, config.features, config.res_scale)


class Upscaler(Network, nn.Module):
    """A network of an encoder and a decoder that renders the features at any size.

    Attributes:
        encoder: maps an image to features of its size.
        feat: of the last `gen_feat`.
    """

    encoder: EDSR | RDN
    feat: torch.Tensor | None

    def gen_feat(self, inp: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] in [-1, 1] -> features [B, C, h, w], which `query_rgb` then decodes."""
        self.feat = self.encoder(inp)
        return self.feat

    def _decode(self, feat: torch.Tensor, image: torch.Tensor, size: tuple[int, int], **options: Any) -> torch.Tensor:
        """Returns the image of `size`. image: the input in [-1, 1]; options: of the decoder's `render`."""
        raise NotImplementedError

    def _decoder_work(self) -> float:
        """See `common.progress.multiplications`."""
        raise NotImplementedError

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
            options: of the decoder's `render`: cell, backend.

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
            of_decoder = self._decoder_work() * len(image) * math.prod(size)
            encoding, decoding = shares(progress, of_encoder, of_decoder)
        inp = image.to(parameter.dtype) * 2 - 1
        feat = self.encoder.tiled(inp, workspace, encoding)
        out = self._decode(feat, inp, size, workspace=workspace, progress=decoding, **options)
        check_weights(self, out)
        return out.add_(1).div_(2).clamp_(0, 1).to(image.dtype)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles do not contain the last features
        return {**self.__dict__, "feat": None}
