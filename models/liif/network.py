"""LIIF: an EDSR encoder in front of the local implicit decoder; a picture at any size."""

from dataclasses import dataclass
from pathlib import Path

import torch

from inr_kernels.local_implicit import LocalImplicitDecoder
from inr_kernels.local_implicit.functional import WORKSPACE

from ..common import checkpoints
from .edsr import EDSR

PRETRAINED = Path(__file__).parents[1] / "weights" / "liif_small.safetensors"
# LIIF's names of the encoders that an EDSR can be, with their defaults.
ENCODERS = {
    "edsr-baseline": {"n_resblocks": 16, "n_feats": 64, "res_scale": 1.0},
    "edsr": {"n_resblocks": 32, "n_feats": 256, "res_scale": 0.1},
}


@dataclass(frozen=True)
class LIIFConfig:
    """What fixes a LIIF's parameters; the defaults are yinboc/liif's EDSR-baseline model.

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


class LIIF(LocalImplicitDecoder):
    """A picture as a continuous function: features = EDSR(picture), rgb = decoder(features, coord, cell).

    `forward`, `gen_feat` and `query_rgb` are LIIF's, on values in [-1, 1]; `upscale` takes and
    returns pictures in [0, 1]. The state dict has LIIF's keys, `encoder.*` and `imnet.*`.

    Source: Chen, Liu and Wang, Learning Continuous Image Representation with Local Implicit Image
    Function, CVPR 2021.

    Example:
        >>> model = LIIF(SMALL)
        >>> model.upscale(torch.rand(1, 3, 10, 12), scale=2.5).shape
        torch.Size([1, 3, 25, 30])
    """

    def __init__(self, config=LIIFConfig()):
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
        self.feat = None

    def gen_feat(self, inp):
        """[B, 3, h, w] in [-1, 1] -> features [B, C, h, w], which `query_rgb` then decodes."""
        self.feat = self.encoder(inp)
        return self.feat

    def query_rgb(self, coord, cell=None):
        """coord, cell [B, Q, 2] -> [B, Q, 3] in [-1, 1] (about), on the last `gen_feat`."""
        if self.feat is None:
            raise RuntimeError("query_rgb needs features: call gen_feat first")
        return super().forward(self.feat, coord, cell)

    def forward(self, inp, coord, cell=None):
        """gen_feat, then query_rgb."""
        self.gen_feat(inp)
        return self.query_rgb(coord, cell)

    @torch.no_grad()
    def upscale(self, image, scale=None, *, size=None, workspace=WORKSPACE, **options):
        """A picture [B, 3, h, w] in [0, 1] -> [B, 3, H, W] in [0, 1], in the parameters' dtype.

        Beside both pictures it needs the features (4 C bytes a pixel of the input in float32) and at
        most about `workspace` bytes, at any size: the encoder runs on overlapping tiles, the decoder
        on bands of rows.

        Args:
            scale: H = round(scale * h), W = round(scale * w); it was trained for 1 to 4.
            size: (H, W) instead.
            options: of `LocalImplicitDecoder.render`: cell, backend, progress.
        """
        if scale is not None and not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite; got {scale}")
        if (scale is None) == (size is None):
            raise ValueError(f"give either scale or size; got scale={scale}, size={size}")
        if image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(f"image must have shape [B, 3, h, w]; got {list(image.shape)}")
        if size is None:
            size = tuple(max(1, round(n * scale)) for n in image.shape[2:])
        image = image.to(next(self.parameters()))
        feat = self.encoder.tiled(image * 2 - 1, workspace)
        return self.render(feat, size, workspace=workspace, **options).add_(1).div_(2).clamp_(0, 1)

    def save(self, path, notes=None):
        """Writes safetensors: parameters, config and notes (JSON: on what it was trained, say)."""
        checkpoints.save(self, path, notes or self.notes)

    @classmethod
    def from_checkpoint(cls, path):
        """A model in eval mode from what `save` wrote (.safetensors) or from yinboc/liif's .pth.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged, or holds something else; the message says what.
        """
        read = checkpoints.read if Path(path).suffix == ".safetensors" else _read_pth
        return checkpoints.load(path, "a LIIF", lambda config: cls(LIIFConfig(**config)), read)

    @classmethod
    def pretrained(cls):
        """The small model that ships with the package: 229 K parameters, 8 blocks of 32 features.

        Trained on nine photographs of scikit-image (`models/training/liif.py`, 7000 steps; `notes` hold
        the list). On its `coffee`, which it never saw, PSNR against bicubic interpolation: x2 30.99
        and 29.09 dB, x2.7 28.82 and 27.42 dB, x3.7 27.25 and 26.10 dB.
        """
        return cls.from_checkpoint(PRETRAINED)

    def __getstate__(self):  # copies and pickles leave the last features behind
        return {**self.__dict__, "feat": None}


def _read_pth(path):
    """{"model": {"name": "liif", "args": ..., "sd": state dict}, ...}"""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not {"name", "args", "sd"} <= model.keys():
        raise ValueError("it has no model of name, args and sd")
    if model["name"] != "liif":
        raise ValueError(f"it holds a {model['name']!r}")
    args = dict(model["args"])
    encoder, imnet = args.pop("encoder_spec"), args.pop("imnet_spec")
    if encoder["name"] not in ENCODERS:
        raise ValueError(f"its encoder is {encoder['name']!r}, known are {', '.join(ENCODERS)}")
    edsr = {**ENCODERS[encoder["name"]], **encoder.get("args", {})}
    if not edsr.get("no_upsampling"):
        raise ValueError("its encoder has an upsampler")
    if imnet is None or imnet["name"] != "mlp" or imnet["args"]["out_dim"] != 3:
        raise ValueError(f"its decoder is no mlp of three outputs: {imnet}")
    config = {
        "blocks": edsr["n_resblocks"],
        "features": edsr["n_feats"],
        "res_scale": edsr["res_scale"],
        "hidden": tuple(imnet["args"]["hidden_list"]),
        **args,
    }
    return config, model["sd"], {}
