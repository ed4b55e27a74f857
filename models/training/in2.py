"""IN²'s recipe. See `filling` for the losses, and configs/in2_paper.yaml for the paper's values.

A further term, `hint`, compares the body's features with those of a trained DEAR, the teacher:

    mean_c mean_p w_p (A f - t)²_cp / var_c(t)

f: the features; t: the teacher's map F at the image's size, less the mean of each channel; A: a 1 x 1 convolution from
a feature to its pixels, trained beside the network; w_p = 1 + 2 M_p / mean(M). A network that adds to a smooth fill
needs this at the start: random features tell nothing about what the fill lacks, so that without it the first steps
only make them smaller.

Source: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..dear.network import DEAR
from ..in2.network import IN2
from . import filling
from .config import option
from .filling import FillingLoss, FillingOptions, draw, sample, show, take_over, validate
from .state import network_config

__all__ = ["NETWORK", "Objective", "Options", "begin", "check", "draw", "groups", "sample", "show", "validate"]

NETWORK = IN2
EXTRAS = {"cv2": "opencv-python-headless"}  # of the validation
MISSING = 2.0  # added to the weight 1 of a pixel in `hint`, in units of the share of missing pixels


@dataclass
class IN2Loss(FillingLoss):
    """Weights of the terms; 0 switches a term off."""

    hint: float = option(0.0, "squared differences of the teacher's features from a linear map of the network's")
    teacher: str = option("", "file of the DEAR that is the teacher; empty: the one that ships")


@dataclass
class Options(FillingOptions):
    """Of IN2."""

    head_lr: float = option(1.0, "learning rate of the last convolution, as a multiple of lr")
    loss: IN2Loss = option(IN2Loss, "weights of the loss's terms; 0 switches one off")


def check(options: Options) -> None:
    """Raises ValueError or OSError if the options do not fit together, or a file is missing."""
    filling.check(options)
    if options.loss.hint and options.loss.teacher:
        with Path(options.loss.teacher).open("rb"):
            pass


def groups(model: IN2, options: Options) -> list[dict[str, Any]]:
    """The optimizer's groups of parameters; `factor` multiplies the learning rate."""
    head = set(model.decoder.head.parameters())
    others = [parameter for parameter in model.parameters() if parameter not in head]
    return [{"params": others}, {"params": [*model.decoder.head.parameters()], "factor": options.head_lr}]


def begin(model: IN2, start: IN2) -> None:
    """See `filling.take_over`."""
    take_over(model, start, model.decoder.head)


class Objective(filling.Objective):
    """The loss of an IN2; arguments and attributes: as `filling.Objective`."""

    def __init__(self, options: Options, device: torch.device | str = "cpu"):
        super().__init__(options, device)
        self.hint, self.teacher = options.loss.hint, None
        if self.hint:
            teacher = DEAR.from_checkpoint(options.loss.teacher) if options.loss.teacher else DEAR.pretrained()
            self.teacher = teacher.to(device).eval().requires_grad_(False)
            config = network_config(IN2, options.model)
            self.side = 2 ** len(config.channels)  # pixels of a feature
            hint = nn.Conv2d(config.channels[-1], teacher.config.features * self.side**2, 1).to(device)
            nn.init.zeros_(hint.weight)  # a random map would first make the features smaller
            self.parts["hint"] = hint

    def _predict(
        self, model: Any, image: torch.Tensor, mask: torch.Tensor, autocast: Callable[[], AbstractContextManager]
    ) -> tuple[torch.Tensor, filling.Terms]:
        """The prediction, and `hint`."""
        if self.teacher is None:
            return super()._predict(model, image, mask, autocast)
        with autocast():
            features = model.encode(image, mask)
            out = model.decode(features, (image.shape[2], image.shape[3]))
            mapped = F.pixel_shuffle(self.parts["hint"](features.feat), self.side)
            with torch.no_grad():
                target = self.teacher.encode(image, mask).encoded[:, : self.teacher.config.features]
        return out, {"hint": self.hint * hint_loss(mapped.to(image.dtype), target.to(image.dtype), mask)}


def hint_loss(mapped: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the weighted mean [] of the squared differences from the target less its mean.

    Mean and variance are those of a channel in the batch, of each process its own; a channel that hardly varies counts
    in units of a tenth of the mean variance.

    mapped [B, C, H', W'], target [B, C, H, W], mask [B, 1, H, W]; only the rows and columns that both have count.
    """
    height, width = (min(pair) for pair in zip(mapped.shape[2:], target.shape[2:], strict=True))
    mapped, target, mask = (x[..., :height, :width] for x in (mapped, target, mask))
    variance, mean = torch.var_mean(target, (0, 2, 3), keepdim=True)
    error = (mapped - (target - mean)).square() / variance.clamp(min=0.1 * variance.mean())
    return (error * (1 + MISSING * mask / mask.mean().clamp(min=1e-3))).mean()
