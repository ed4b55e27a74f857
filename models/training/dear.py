"""DEAR's recipe: small images with missing pixels in, the colours of larger ones out, L1 + 0.01 L1 (eq. 10)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from inr_kernels._core.checks import require

from ..data.crops import Change, margins, patch, queries
from ..dear.network import DEAR
from ..evaluation.run import by_scale, compare_joint
from .config import option, require_range
from .filling import MaskOptions, check_masks, take_over
from .samples import Drawing

NETWORK = DEAR
EXTRAS = {"cv2": "opencv-python-headless"}  # of the validation
VALIDATED = (1, 2, 4)  # scales


@dataclass
class DEARLoss:
    """Weights of the terms; 0 switches a term off."""

    l1: float = option(1.0, "mean absolute error of the queried colours")
    l2: float = option(0.0, "their mean squared error")
    missing: float = option(0.0, "added to the weight 1 of a colour in both, where the nearest pixel is missing")
    reconstruction: float = option(0.01, "mean absolute error of the input that the predicted kernels reconstruct")


@dataclass
class Options(MaskOptions):
    """Of DEAR."""

    crop: str = option("patches", "patches (random), or margins (the largest square, resized)")
    side: int = option(40, "side of an input, in pixels")
    scales: list[float] = option([1.0, 4.0], "least and largest scale, one of each batch")
    queries: int = option(384, "random pixels of each target; 0: all pixels")
    zoom: float = option(2.0, "the most by which a picture is shrunk before a patch is taken")
    permute: bool = option(True, "permute the channels at random")
    loss: DEARLoss = option(DEARLoss, "weights of the loss's terms; 0 switches one off")


def check(options: Options) -> None:
    """Raises ValueError if the options do not fit together."""
    require_range(options, "scales", "of at least 1", lambda scale: scale >= 1)
    require(options.side > 0, "side", "be positive", options.side)
    require(options.queries >= 0, "queries", "not be negative", options.queries)
    require(options.crop in ("patches", "margins"), "crop", "be patches or margins", repr(options.crop))
    check_masks(options)


def begin(model: DEAR, start: DEAR) -> None:
    """See `filling.take_over`."""
    layers: Any = model.implicit.imnet.layers
    take_over(model, start, layers[-1])


def draw(options: Options, rng: numpy.random.Generator) -> int:
    """Draws the side of a batch's targets."""
    low, high = options.scales
    return round(options.side * rng.uniform(low, high))


def sample(options: Options, drawing: Drawing, rng: numpy.random.Generator, n: int) -> tuple[torch.Tensor, ...]:
    """Returns image [3, side, side], mask [1, side, side], coord [Q, 2], cell [2] and rgb [Q, 3], in [0, 1]."""
    side, size = options.side, drawing.image.size
    part = patch(size, rng, (n, n), options.zoom) if options.crop == "patches" else margins(size, rng, (n, n))
    target = part.cut(drawing.image)
    mask = drawing.mask(part._replace(size=(side, side)), rng)
    change = Change(rng, turn=True, permute=options.permute)
    image = change.picture(target.resize((side, side), Image.Resampling.BICUBIC))
    return image, change.mask(mask).contiguous(), *queries(change.picture(target), rng, options.queries)


class Objective:
    """The loss of eq. 10; arguments and attributes: as `filling.Objective`."""

    def __init__(self, options: Options, device: torch.device | str = "cpu"):
        self.weights = options.loss
        self.parts: dict[str, nn.Module] = {}

    def __call__(
        self, model: DEAR, batch: tuple[torch.Tensor, ...], autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, torch.Tensor]:
        """Returns the weighted terms; the encoders run in `autocast`."""
        image, mask, coord, cell, rgb = batch
        with autocast():
            encoded, kernels, seen = model.encode(image, mask)
        colours = model.decode_at(encoded.to(image.dtype), seen, coord, cell if model.config.cell_decode else None)
        weights, terms = self.weights, {}
        weight = 1 + weights.missing * _nearest(mask, coord)
        if weights.l1:
            terms["l1"] = weights.l1 * (weight * (colours - rgb).abs()).mean()
        if weights.l2:
            terms["l2"] = weights.l2 * (weight * (colours - rgb).square()).mean()
        if weights.reconstruction and model.config.pim:
            rebuilt = model.reconstruct(image, mask, kernels.to(image.dtype))
            terms["reconstruction"] = weights.reconstruction * F.l1_loss(rebuilt, image)
        return terms


def _nearest(mask: torch.Tensor, coord: torch.Tensor) -> torch.Tensor:
    """The values [B, Q, 1] of a mask [B, 1, H, W] at the pixels nearest to coord [B, Q, 2]."""
    grid = coord.flip(-1)[:, None]  # (x, y)
    return F.grid_sample(mask, grid, mode="nearest", padding_mode="border", align_corners=False)[:, 0, 0, :, None]


def validate(model: DEAR, photos: list[Any], options: Options) -> dict[str, float]:
    """Returns the mean PSNR in dB of the network and of the baseline of `compare_joint`, by scale, 15 % missing."""
    return by_scale(compare_joint, model, photos, VALIDATED, "baseline")


def show(model: DEAR, batch: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Returns the masked input and its filled enlargement by 4 of a batch's first sample, each [3, h, w]."""
    image, mask = (tensor[:1] for tensor in batch[:2])
    image = image.clamp(0, 1)
    return [(image * (1 - mask))[0], model.inpaint(image, mask, scale=4)[0]]
