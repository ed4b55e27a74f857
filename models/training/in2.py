"""Trains a small IN², as the shipped checkpoint: `python -m inr_kernels.models.training.in2`.

IN²'s training (Adam, free-form masks, a random aspect ratio for every batch) on crops of photographs of scikit-image,
on a CPU. The loss is L1 with a higher weight on missing pixels; `--adversarial` and `--vgg` add the paper's losses. The
photograph `HELD_OUT` is not used: the tests measure on it.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

from ..data.crops import in2_batch
from ..data.photographs import HELD_OUT, PART, TRAINED_ON, photographs
from ..evaluation.run import compare_inpainting
from ..in2 import losses
from ..in2.network import IN2, SMALL
from . import loop

SAVE_EVERY = 250  # steps
MISSING = 5  # weight of L1 on missing pixels, added to L1 on all
WEIGHTS = losses.LossWeights(l1=1)


class Adversary:
    """The discriminator and its optimizer, whose learning rate `loop.optimize` sets with the network's."""

    def __init__(self) -> None:
        self.discriminator = losses.Discriminator()
        self.optimizer = torch.optim.Adam(self.discriminator.parameters())

    def step(self, image: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Trains the discriminator on photographs and network outputs [B, 3, H, W]; returns the generator's
        L_G + feature_matching L_fm.
        """
        real, fake = self.discriminator(image)[0], self.discriminator(out.detach())[0]
        penalty = losses.r1_penalty(self.discriminator, image)
        self.optimizer.zero_grad()
        (losses.discriminator_loss(real, fake) + WEIGHTS.r1 * penalty).backward()
        self.optimizer.step()
        with torch.no_grad():
            features = self.discriminator(image)[1]
        logits, matched = self.discriminator(out)
        matching = losses.feature_matching_loss(features, matched)
        return losses.generator_loss(logits) + WEIGHTS.feature_matching * matching


def training_step(
    model: IN2,
    image: torch.Tensor,
    mask: torch.Tensor,
    adversary: Adversary | None = None,
    vgg: losses.VGG19Features | None = None,
    use_bfloat16: bool = False,
    weights: losses.LossWeights = WEIGHTS,
) -> torch.Tensor:
    """Returns the loss of one step: L1 + MISSING L1 on missing pixels, with the paper's losses if they are given.

    Args:
        image, mask: [B, 3, H, W] and [B, 1, H, W], as `in2_batch` draws them.
        adversary: adds L_G and L_fm, and trains the discriminator.
        vgg: adds L_per.
        use_bfloat16: run the network in bfloat16, by autocast.
        weights: of L1 and L_per; with `l1=0`, the paper's losses alone.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bfloat16):
        out = model.predict(image, mask).float()
    loss = weights.l1 * losses.l1_loss(out, image, mask, MISSING)
    whole = torch.where(mask == 0, image, out)
    if adversary:
        loss = loss + adversary.step(image, whole)
    if vgg:
        loss = loss + weights.perceptual * losses.perceptual_loss(vgg, image, whole)
    return loss


def measured(model: IN2) -> dict[str, tuple[float, ...]]:
    """{"256x384": (network, mean colour, Telea), ...} on the middle of the held-out photograph, in dB."""
    (photo,) = photographs(HELD_OUT)
    left, top, right, bottom = PART
    parts = [photo.crop((left, top, right - less, bottom - less)) for less in (0, 3)]
    return {f"{p.height}x{p.width}": tuple(round(v, 2) for v in compare_inpainting(model, p)) for p in parts}


def train(args: Namespace) -> IN2:
    """Trains a new network with the options of `main`."""
    torch.manual_seed(args.seed)
    model = IN2(SMALL)
    photos = photographs(*TRAINED_ON)
    photos += [photo.transpose(Image.Transpose.TRANSPOSE) for photo in photos]
    adversary = Adversary() if args.adversarial else None
    extra_state: dict[str, Any] = {}
    if adversary:
        extra_state = {"discriminator": adversary.discriminator, "discriminator_optimizer": adversary.optimizer}
    vgg = losses.VGG19Features(args.vgg) if args.vgg else None

    def loss(rng: numpy.random.Generator, use_bfloat16: bool) -> torch.Tensor:
        return training_step(model, *in2_batch(photos, rng, args.batch, args.area), adversary, vgg, use_bfloat16)

    return loop.optimize(model, args, loss, measured, SAVE_EVERY, extra_state=extra_state)


def main() -> None:
    """Runs the command line."""
    about = (__doc__ or "").split("\n")[0]
    parser = loop.parser(about, out=IN2.PRETRAINED, steps=4500, lr=1e-3)
    parser.add_argument("--area", type=int, default=64**2, help="pixels of a crop")
    parser.add_argument(
        "--adversarial", action="store_true", help="add the paper's L_G and L_fm; R1 in the discriminator's step"
    )
    parser.add_argument(
        "--vgg", type=Path, metavar="PATH", help="add the paper's L_per; weights of torchvision's vgg19"
    )
    args = parser.parse_args()
    model = train(args)
    options = ", --adversarial" * args.adversarial + ", --vgg" * bool(args.vgg)
    notes = loop.notes(args, f"{args.area} pixels", options, "psnr_mean_telea", measured(model))
    model.save(args.out, notes, dtype=torch.float16)
    print(notes)


if __name__ == "__main__":
    main()
