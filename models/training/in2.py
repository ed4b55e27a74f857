"""The recipe behind the shipped checkpoint: `python -m inr_kernels.models.training.in2`.

IN²'s training (Adam, free-form masks, every batch of another aspect ratio) on crops of photographs of scikit-image, on
a CPU. The loss is L1, heavier in the holes; `--adversarial` and `--vgg` add the paper's. `HELD_OUT` takes no part in
it: the tests measure on that one.
"""

import math
from pathlib import Path

import numpy
import torch
from PIL import Image

from ..data.images import to_image, to_tensor
from ..data.masks import free_form_mask
from ..data.photographs import HELD_OUT, PART, TRAINED_ON, photographs
from ..evaluation.baselines import filled, telea
from ..evaluation.metrics import psnr
from ..in2 import losses as in2_losses
from ..in2.network import IN2, PRETRAINED, SMALL
from . import loop

SAVE_EVERY = 250  # steps
ASPECTS = (9 / 16, 16 / 9)
ZOOM = 2  # how far a photograph is shrunk at most
HOLES = 5  # weight of L1 in the holes beside L1 of the whole
WEIGHTS = in2_losses.LossWeights()


def crop_shape(rng, area):
    """(h, w) of a batch, h w = area but for rounding, log h / w uniform between 9:16 and 16:9; no multiples of 8.

    The adaptive training strategy of the paper, whose area is 512².
    """
    aspect = math.exp(rng.uniform(*map(math.log, ASPECTS)))
    height = round(math.sqrt(area * aspect))
    return height, round(area / height)


def crop(photos, rng, shape):
    """[3, h, w] in [0, 1]: a photograph without its margins, shrunk by up to `ZOOM`, mirrored at random.

    Its channels change places, and each may turn negative: or grey is the best of fillings for long.
    """
    photo = photos[rng.integers(len(photos))]
    most = min(n / m for n, m in zip(photo.size, reversed(shape), strict=True))
    zoom = rng.uniform(min(1, most), min(ZOOM, most)) if rng.random() < 0.5 else min(1, most)
    width, height = (m * zoom for m in reversed(shape))
    left, top = (int(rng.uniform(0, n - m)) for n, m in zip(photo.size, (width, height), strict=True))
    picture = to_tensor(photo.resize(shape[::-1], Image.BICUBIC, (left, top, left + width, top + height)))[0]
    axes = [axis for axis in (1, 2) if rng.random() < 0.5]
    negative = torch.from_numpy(rng.random((3, 1, 1)) < 0.5)
    return torch.where(negative, 1 - picture, picture)[rng.permutation(3)].flip(axes)


def batch(photos, rng, size, area):
    """image [B, 3, h, w], mask [B, 1, h, w], of one random shape."""
    shape = crop_shape(rng, area)
    masks = [free_form_mask(shape, rng, rng.uniform(0.05, 0.4)) for _ in range(size)]
    return torch.stack([crop(photos, rng, shape) for _ in masks]), torch.stack(masks)


class Adversary:
    """The discriminator and its optimizer, whose learning rate `loop.optimize` sets with the network's."""

    def __init__(self):
        self.discriminator = in2_losses.Discriminator()
        self.optimizer = torch.optim.Adam(self.discriminator.parameters())

    def step(self, image, out):
        """Trains the discriminator; returns the generator's L_G + feature_matching L_fm."""
        real, fake = self.discriminator(image)[0], self.discriminator(out.detach())[0]
        penalty = in2_losses.r1_penalty(self.discriminator, image)
        self.optimizer.zero_grad()
        (in2_losses.discriminator_loss(real, fake) + WEIGHTS.r1 * penalty).backward()
        self.optimizer.step()
        with torch.no_grad():
            features = self.discriminator(image)[1]
        logits, matched = self.discriminator(out)
        matching = in2_losses.feature_matching_loss(features, matched)
        return in2_losses.generator_loss(logits) + WEIGHTS.feature_matching * matching


def training_step(model, image, mask, adversary=None, vgg=None, fast=False):
    """The loss of one step: L1 + HOLES L1 in the holes, with what the paper has beside it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        out = model.predict(image, mask).float()
    error = (out - image).abs()
    loss = error.mean() + HOLES * (error * mask).sum() / (3 * mask.sum())
    whole = torch.where(mask == 0, image, out)
    if adversary:
        loss = loss + adversary.step(image, whole)
    if vgg:
        loss = loss + WEIGHTS.perceptual * in2_losses.perceptual_loss(vgg, image, whole)
    return loss


def measure(model, photo):
    """PSNR of a photograph that lost 15 % of its pixels: filled by the model, with the mean colour, by Telea."""
    image = to_tensor(photo)
    mask = free_form_mask(photo.size[::-1], numpy.random.default_rng(0))[None]
    pictures = to_image(model.inpaint(image, mask)), to_image(filled(image, mask)), telea(photo, mask)
    return tuple(psnr(picture, photo, 0) for picture in pictures)


def measured(model):
    """{"256x384": (model, mean colour, Telea), ...} on the held-out photograph, in dB."""
    (photo,) = photographs(HELD_OUT)
    left, top, right, bottom = PART
    parts = [photo.crop((left, top, right - less, bottom - less)) for less in (0, 3)]
    return {f"{part.height}x{part.width}": tuple(round(v, 2) for v in measure(model, part)) for part in parts}


def train(args):
    torch.manual_seed(args.seed)
    model = IN2(SMALL)
    photos = [photo for name in TRAINED_ON for photo in photographs(name)]
    photos += [photo.transpose(Image.Transpose.TRANSPOSE) for photo in photos]
    adversary = Adversary() if args.adversarial else None
    beside = {"discriminator": adversary.discriminator, "its optimizer": adversary.optimizer} if adversary else {}
    vgg = in2_losses.VGG19Features(args.vgg) if args.vgg else None

    def loss(rng, fast):
        return training_step(model, *batch(photos, rng, args.batch, args.area), adversary, vgg, fast)

    return loop.optimize(model, args, loss, measured, SAVE_EVERY, beside=beside)


def main():
    about = __doc__.split("\n")[0]
    parser = loop.parser(about, out=PRETRAINED, steps=4500, lr=1e-3)
    parser.add_argument("--area", type=int, default=64**2, help="pixels of a crop")
    parser.add_argument("--adversarial", action="store_true", help="add the paper's L_G and L_fm, R1 in the other step")
    parser.add_argument(
        "--vgg", type=Path, metavar="PATH", help="add the paper's L_per; weights of torchvision's vgg19"
    )
    args = parser.parse_args()
    model = train(args)
    notes = {
        "trained_on": [f"skimage.data.{name}" for name in TRAINED_ON],
        "held_out": f"skimage.data.{HELD_OUT}",
        "recipe": loop.recipe(args, f"{args.area} pixels")
        + ", --adversarial" * args.adversarial
        + ", --vgg" * bool(args.vgg),
        "psnr_mean_telea": measured(model),
    }
    model.save(args.out, notes, dtype=torch.float16)
    print(notes)


if __name__ == "__main__":
    main()
