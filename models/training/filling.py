"""What the recipes of networks that fill holes share: options, samples and losses.

    loss = l1 L_1 + l2 L_2 + adversarial L_G + feature_matching L_fm + perceptual L_per
    discriminator: L_D + r1 R_1, in the same step

A term whose weight is 0 is not computed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from inr_kernels._core.checks import require

from ..common.network import Inpainter
from ..data.crops import Change, margins, patch, shape_of
from ..data.sources import FREE_FORM
from ..evaluation.run import compare_inpainting
from ..in2 import losses
from .config import Options, option, require_range
from .samples import Drawing

Terms = dict[str, torch.Tensor]
MASKS = (
    "free-form (random strokes), a kind of inr-kernels evaluate such as thin, strokes:20-30 or noise, or folders and"
)
MASKS += " .txt lists of masks, white = missing"


@dataclass
class FillingLoss:
    """Weights of the terms; 0 switches a term off."""

    l1: float = option(1.0, "mean absolute error of the prediction on all pixels")
    missing: float = option(5.0, "mean absolute error on the missing pixels, as a multiple of l1")
    l2: float = option(0.0, "mean squared error on the missing pixels")
    adversarial: float = option(0.0, "L_G; with this, feature_matching and r1 at 0 there is no discriminator")
    feature_matching: float = option(0.0, "L_fm, the differences of the discriminator's activations")
    r1: float = option(0.0, "R_1, of the discriminator's loss")
    perceptual: float = option(0.0, "L_per, the differences of VGG-19's activations")
    vgg: str = option("", "file of torchvision's vgg19 weights, for perceptual")


@dataclass
class MaskOptions(Options):
    """Of recipes that draw masks."""

    masks: Any = option(FREE_FORM, MASKS)
    pairing: str = option("random", "masks of folders: random, or name (the mask that has the picture's name)")
    share: list[float] = option([0.05, 0.4], "lowest and highest share of missing pixels of free-form masks")


@dataclass
class FillingOptions(MaskOptions):
    """Of recipes of networks that fill at the input's size."""

    crop: str = option("patches", "patches (random), or margins (the largest part of the aspect ratio, resized)")
    area: int = option(64**2, "pixels of a crop")
    aspect: list[float] = option(
        [9 / 16, 16 / 9], "lowest and highest height / width, one of each batch; 1, 1: squares"
    )
    zoom: float = option(2.0, "the most by which a picture is shrunk before a patch is taken")
    permute: bool = option(False, "permute the channels at random")
    invert: bool = option(False, "invert each channel in half of the cases")
    loss: FillingLoss = option(FillingLoss, "weights of the loss's terms; 0 switches one off")


def check(options: FillingOptions) -> None:
    """Raises ValueError or OSError if the options do not fit together, or VGG-19's file is missing."""
    require(options.crop in ("patches", "margins"), "crop", "be patches or margins", repr(options.crop))
    require_range(options, "aspect", "above 0", lambda aspect: aspect > 0)
    require(options.area > 0, "area", "be positive", options.area)
    check_masks(options)
    if options.loss.perceptual:
        vgg = "name the file of VGG-19's weights, torchvision's vgg19-dcbb9e9d.pth, or set loss.perceptual=0"
        require(bool(options.loss.vgg), "loss.vgg", vgg, "no file")
        with Path(options.loss.vgg).open("rb"):
            pass


def check_masks(options: MaskOptions) -> None:
    """Raises ValueError if the range of shares is none."""
    require_range(options, "share", "from 0 to below 1", lambda share: 0 <= share < 1)
    require(options.pairing in ("random", "name"), "pairing", "be random or name", repr(options.pairing))


def take_over(model: Any, start: Any, last: nn.Module) -> None:
    """Takes over the parameters of a checkpoint.

    If the network adds to a smooth fill, and the checkpoint's does not, the last layer becomes zero: the first output
    is then the fill.
    """
    model.load_state_dict(start.state_dict())
    if model.config.fill == "smooth" and start.config.fill != "smooth":
        for parameter in last.parameters():
            nn.init.zeros_(parameter)


def draw(options: FillingOptions, rng: numpy.random.Generator) -> tuple[int, int]:
    """Draws the shape (h, w) of a batch."""
    return shape_of(options.area, options.aspect, rng)


def sample(
    options: FillingOptions, drawing: Drawing, rng: numpy.random.Generator, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns image [3, h, w] in [0, 1] and mask [1, h, w]."""
    size = drawing.image.size
    part = patch(size, rng, shape, options.zoom) if options.crop == "patches" else margins(size, rng, shape)
    mask = drawing.mask(part, rng)
    change = Change(rng, permute=options.permute, invert=options.invert)
    return change.picture(part.cut(drawing.image)), change.mask(mask).contiguous()


class Objective:
    """The loss of a network that fills holes.

    Args:
        options: with the weights.
        device: of the networks that it needs.

    Attributes:
        parts: networks that are trained beside the network, by name.
    """

    def __init__(self, options: FillingOptions, device: torch.device | str = "cpu"):
        self.weights = weights = options.loss
        self.parts: dict[str, nn.Module] = {}
        self.vgg = losses.VGG19Features(weights.vgg).to(device) if weights.perceptual else None
        if weights.adversarial or weights.feature_matching or weights.r1:
            self.parts["discriminator"] = losses.Discriminator().to(device)

    def __call__(
        self, model: Inpainter, batch: tuple[torch.Tensor, ...], autocast: Callable[[], AbstractContextManager]
    ) -> Terms:
        """Returns the weighted terms, whose sum is differentiated.

        Args:
            model: the network.
            batch: image [B, 3, h, w] and mask [B, 1, h, w].
            autocast: the network runs in this context.
        """
        (image, mask), weights = batch, self.weights
        out, terms = self._predict(model, image, mask, autocast)
        out = out.to(image.dtype)
        if weights.l1:
            terms["l1"] = weights.l1 * losses.l1_loss(out, image, mask, weights.missing)
        if weights.l2:
            terms["l2"] = weights.l2 * losses.l2_loss(out, image, mask)
        whole = torch.where(mask == 0, image, out)
        if self.vgg:
            terms["perceptual"] = weights.perceptual * losses.perceptual_loss(self.vgg, image, whole)
        if discriminator := self.parts.get("discriminator"):
            terms |= self._adversarial(discriminator, image, whole)
        return terms

    def _predict(
        self, model: Any, image: torch.Tensor, mask: torch.Tensor, autocast: Callable[[], AbstractContextManager]
    ) -> tuple[torch.Tensor, Terms]:
        """The prediction, and terms of the network's features."""
        with autocast():
            return model.predict(image, mask), {}

    def _adversarial(self, discriminator: nn.Module, image: torch.Tensor, whole: torch.Tensor) -> Terms:
        """The terms of the network, which leave no gradients in the discriminator, and the discriminator's."""
        weights, terms = self.weights, Terms()
        discriminator.requires_grad_(False)
        logits, features = discriminator(whole)
        if weights.adversarial:
            terms["adversarial"] = weights.adversarial * losses.generator_loss(logits)
        if weights.feature_matching:
            real = discriminator(image)[1]
            terms["feature_matching"] = weights.feature_matching * losses.feature_matching_loss(real, features)
        discriminator.requires_grad_(True)
        real_logits, fake_logits = discriminator(image)[0], discriminator(whole.detach())[0]
        terms["discriminator"] = losses.discriminator_loss(real_logits, fake_logits)
        if weights.r1:
            terms["r1"] = weights.r1 * losses.r1_penalty(discriminator, image)
        return terms


def validate(model: Inpainter, photos: list[Any], options: Any) -> dict[str, float]:
    """Returns the mean PSNR in dB of the network, of the mean colour and of Telea's method, with 15 % missing."""
    means = torch.tensor(
        [compare_inpainting(model, photo) for photo in photos], dtype=torch.float64, device="cpu"
    ).mean(0)
    return dict(zip(("psnr", "psnr_mean_fill", "psnr_telea"), means.tolist(), strict=True))


def show(model: Inpainter, batch: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Returns the masked image, the filled one and the original of a batch's first sample, each [3, h, w]."""
    image, mask = (tensor[:1] for tensor in batch)
    return [(image * (1 - mask))[0], model.inpaint(image, mask)[0], image[0]]
