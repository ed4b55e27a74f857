"""ImplicitAutoencoder's recipe: crops of one size, masks of noise, mean squared error and total variation."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from inr_kernels._core.checks import require

from ..autoencoder import AutoencoderLossWeights, ImplicitAutoencoder, autoencoder_loss
from ..data import masks
from ..data.crops import Change, patch
from ..data.images import to_tensor
from ..evaluation.baselines import mean_fill
from .config import option
from .filling import MaskOptions, check_masks, show
from .samples import Drawing

__all__ = ["EXTRAS", "NETWORK", "Objective", "Options", "check", "draw", "sample", "show", "validate"]

NETWORK = ImplicitAutoencoder
EXTRAS: dict[str, str] = {}


@dataclass
class Loss:
    """Weights of the terms; 0 switches a term off."""

    mse: float = option(1.0, "alpha, mean squared error of the missing pixels")
    tv: float = option(0.01, "beta, total variation of the filled picture")


@dataclass
class Options(MaskOptions):
    """Of ImplicitAutoencoder."""

    side: int = option(32, "side of a crop, in pixels; with latent=global that of the network")
    zoom: float = option(2.0, "the most by which a picture is shrunk before a crop is taken")
    loss: Loss = option(Loss, "weights of the loss's terms")


def check(options: Options) -> None:
    """Raises ValueError if the options do not fit together."""
    check_masks(options)
    require(options.side > 0, "side", "be positive", options.side)
    if options.model.get("latent", "global") == "global":
        side = options.model.get("side", 32)
        require(options.side == side, "side", f"be the network's {side}, for latent=global", options.side)


def draw(options: Options, rng: numpy.random.Generator) -> None:
    """Draws nothing: all batches have one shape."""


def sample(
    options: Options, drawing: Drawing, rng: numpy.random.Generator, _: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns image [3, side, side] in [0, 1] and mask [1, side, side]."""
    part = patch(drawing.image.size, rng, (options.side, options.side), options.zoom)
    mask = drawing.mask(part, rng)
    change = Change(rng)
    return change.picture(part.cut(drawing.image)), change.mask(mask).contiguous()


class Objective:
    """The deck's loss; arguments and attributes: as `filling.Objective`."""

    def __init__(self, options: Options, device: torch.device | str = "cpu"):
        self.parts: dict[str, nn.Module] = {}
        self.weights = options.loss

    def __call__(
        self,
        model: ImplicitAutoencoder,
        batch: tuple[torch.Tensor, ...],
        autocast: Callable[[], AbstractContextManager],
    ) -> dict[str, torch.Tensor]:
        """Returns the terms "mse" and "tv", weighted; the network runs in `autocast`."""
        image, mask = batch
        with autocast():
            out = model.predict(image, mask)
        weights = {"mse": (self.weights.mse, 0.0), "tv": (0.0, self.weights.tv)}
        return {
            name: autoencoder_loss(out.to(image.dtype), image, mask, AutoencoderLossWeights(*pair))
            for name, pair in weights.items()
            if any(pair)
        }


def validate(model: ImplicitAutoencoder, photos: list[Any], options: Options) -> dict[str, float]:
    """Returns the PSNR in dB of the network and of the mean colour, in the missing half of crops of the photographs."""
    side, crops = options.side, list[torch.Tensor]()
    for photo in photos:
        tiles = to_tensor(photo)[0].unfold(1, side, side).unfold(2, side, side)
        crops += tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)
    image, rng = torch.stack(crops), numpy.random.default_rng(0)
    mask = torch.stack([torch.from_numpy(masks.draw("noise:50", side, side, rng)).float()[None] for _ in crops])
    filled = {"psnr": model.inpaint(image, mask), "psnr_mean_fill": mean_fill(image, mask)}
    missing = 3 * mask.sum()
    errors = {name: ((out.cpu() - image).square() * mask).sum() / missing for name, out in filled.items()}
    return {name: -10 * error.clamp(min=1e-10).log10().item() for name, error in errors.items()}
