"""LIIF: an EDSR encoder in front of the local implicit decoder; renders an image at any size."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from inr_kernels._core.checks import require, require_tensor, shape
from inr_kernels.local_implicit import LocalImplicitDecoder
from inr_kernels.local_implicit.functional import WORKSPACE

from ..common import checkpoints
from ..common.masking import output_size
from ..common.network import WEIGHTS, Network
from ..common.progress import Progress, multiplications, parameters, shares
from .edsr import EDSR

# LIIF's names of the encoders that `EDSR` implements, with their defaults.
ENCODERS = {
    "edsr-baseline": {"n_resblocks": 16, "n_feats": 64, "res_scale": 1.0},
    "edsr": {"n_resblocks": 32, "n_feats": 256, "res_scale": 0.1},
}


@dataclass(frozen=True)
class LIIFConfig:
    """The structure of a LIIF; the defaults are those of yinboc/liif's EDSR-baseline model.

    Args:
        blocks, features, res_scale: of the encoder, see `EDSR`.
        hidden: widths of the decoder's hidden layers.
        local_ensemble, feat_unfold, cell_decode: LIIF's flags.
    """

    blocks: int = 16
    features: int = 64
    res_scale: float = 1.0
    hidden: tuple[int, ...] = (256, 256, 256, 256)
    local_ensemble: bool = True
    feat_unfold: bool = True
    cell_decode: bool = True


SMALL = LIIFConfig(blocks=8, features=32, hidden=(128, 128, 128))


class LIIF(Network, LocalImplicitDecoder):
    """An image as a continuous function: features = EDSR(image), rgb = decoder(features, coord, cell).

    `forward`, `gen_feat` and `query_rgb` are LIIF's, on values in [-1, 1]; `upscale` takes and returns images in
    [0, 1]. The state dict has LIIF's keys, `encoder.*` and `imnet.*`. `from_checkpoint` opens yinboc/liif's .pth files,
    too. LIIF has no `eager` option.

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

    def __init__(self, config: LIIFConfig = LIIFConfig()):
        super().__init__(
            config.features,
            hidden=config.hidden,
            feat_unfold=config.feat_unfold,
            local_ensemble=config.local_ensemble,
            cell_decode=config.cell_decode,
        )
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
        """Renders an image [B, 3, h, w] in [0, 1] at another size: [B, 3, H, W] in [0, 1], in the parameters' dtype.

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
            ValueError: a shape, size, scale or device that does not fit.
        """
        if (scale is None) == (size is None):
            raise ValueError(f"give either scale or size; got scale={scale}, size={size}")
        parameter = next(self.parameters())
        require_tensor(image, "image", dims=(4,), like=parameter)
        require(image.shape[1] == 3, "image", "have shape [B, 3, h, w]", shape(image))
        image = image.to(parameter.dtype)
        size = output_size(image, size, scale)
        encoding = decoding = None
        if progress is not None:
            of_encoder = parameters(self.encoder) * self.encoder.tiled_pixels(image, workspace)
            of_decoder = multiplications(self) * len(image) * math.prod(size)
            encoding, decoding = shares(progress, of_encoder, of_decoder)
        feat = self.encoder.tiled(image * 2 - 1, workspace, encoding)
        out = self.render(feat, size, workspace=workspace, progress=decoding, **options)
        return out.add_(1).div_(2).clamp_(0, 1)

    @classmethod
    def _read(cls, path: checkpoints.FilePath) -> checkpoints.Checkpoint:
        return checkpoints.read(path, cls.NETWORK) if checkpoints.is_safetensors(path) else _read_pth(path)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles do not contain the last features
        return {**self.__dict__, "feat": None}


def _read_pth(path: checkpoints.FilePath) -> checkpoints.Checkpoint:
    """Reads yinboc/liif's {"model": {"name": "liif", "args": ..., "sd": state dict}, ...}."""
    checkpoint = checkpoints.read_torch(path)
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not {"name", "args", "sd"} <= model.keys():
        raise ValueError("it has no model of name, args and sd")
    if model["name"] != "liif":
        raise ValueError(f"it contains the network {model['name']!r}")
    args = dict(model["args"])
    encoder, imnet = args.pop("encoder_spec"), args.pop("imnet_spec")
    if encoder["name"] not in ENCODERS:
        raise ValueError(f"its encoder is {encoder['name']!r}, supported are {', '.join(ENCODERS)}")
    edsr = {**ENCODERS[encoder["name"]], **encoder.get("args", {})}
    if not edsr.get("no_upsampling"):
        raise ValueError("its encoder has an upsampler")
    if imnet is None or imnet["name"] != "mlp" or imnet["args"]["out_dim"] != 3:
        raise ValueError(f"its decoder is not an mlp with three outputs: {imnet}")
    config = {
        "blocks": edsr["n_resblocks"],
        "features": edsr["n_feats"],
        "res_scale": edsr["res_scale"],
        "hidden": tuple(imnet["args"]["hidden_list"]),
        **args,
    }
    return checkpoints.Checkpoint(config, model["sd"], {})
