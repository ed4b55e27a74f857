"""What the recipes of LIIF and LTE share: random patches at random scales, random pixels as queries, L1."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image
from torch import nn

from inr_kernels._core.checks import require

from ..data.crops import Change, patch, queries
from ..evaluation.run import by_scale, compare_upscaling
from .config import Options as Common
from .config import option, require_range
from .samples import Drawing

EXTRAS: dict[str, str] = {}
VALIDATED = (2, 4)  # scales


@dataclass
class Options(Common):
    """Of LIIF and LTE."""

    side: int = option(48, "side of an input, in pixels")
    scales: list[float] = option([1.0, 4.0], "least and largest scale, one of each sample")
    queries: int = option(1024, "random pixels of each target")
    zoom: float = option(2.0, "the most by which a picture is shrunk before a patch is taken")
    permute: bool = option(True, "permute the channels at random")


def check(options: Options) -> None:
    """Raises ValueError if the options do not fit together."""
    require_range(options, "scales", "of at least 1", lambda scale: scale >= 1)
    require(options.side > 0, "side", "be positive", options.side)
    require(options.queries > 0, "queries", "be positive", options.queries)


def draw(options: Options, rng: numpy.random.Generator) -> None:
    """Draws nothing: the samples of a batch have scales of their own."""


def sample(options: Options, drawing: Drawing, rng: numpy.random.Generator, _: None) -> tuple[torch.Tensor, ...]:
    """Returns inp [3, side, side] in [-1, 1], coord [Q, 2], cell [2] and rgb [Q, 3] in [-1, 1]."""
    side = options.side
    low, high = options.scales
    n = round(side * rng.uniform(low, high))
    target = patch(drawing.image.size, rng, (n, n), options.zoom).cut(drawing.image)
    change = Change(rng, turn=True, permute=options.permute)
    inp = change.picture(target.resize((side, side), Image.Resampling.BICUBIC))
    coord, cell, rgb = queries(change.picture(target), rng, options.queries)
    return 2 * inp - 1, coord, cell, 2 * rgb - 1


class Objective:
    """L1 of the queried colours; arguments and attributes: as `filling.Objective`."""

    def __init__(self, options: Options, device: torch.device | str = "cpu"):
        self.parts: dict[str, nn.Module] = {}

    def __call__(
        self, model: Any, batch: tuple[torch.Tensor, ...], autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, torch.Tensor]:
        """Returns {"l1": loss}; the encoder runs in `autocast`."""
        inp, coord, cell, rgb = batch
        with autocast():
            feat = model.gen_feat(inp)
        model.feat = feat.to(inp.dtype)
        return {"l1": (model.query_rgb(coord, cell) - rgb).abs().mean()}


def validate(model: Any, photos: list[Any], options: Options) -> dict[str, float]:
    """Returns the mean PSNR in dB of the network and of bicubic interpolation, by scale."""
    return by_scale(compare_upscaling, model, photos, VALIDATED, "bicubic")


def show(model: Any, batch: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Returns the input and its enlargement by 4 of a batch's first sample, each [3, h, w]."""
    image = (batch[0][:1] + 1) / 2
    return [image[0], model.upscale(image.clamp(0, 1), 4)[0]]
