"""The recipe behind the shipped checkpoint: `python -m inr_kernels.models.training.dear`.

DEAR's training (shrunken pictures with holes in, full pictures out, L1 + 0.01 L1, Adam) on crops of photographs of
scikit-image with free-form masks, on a CPU. `HELD_OUT` takes no part in it: the tests measure on that one. The shipped
file is what `--bf16 --start dear_from_grey.safetensors` gives in 19 minutes of one core. That one, the first to ship
(commit ab51282), had learned its colours from grey, in 3200 steps of interrupted runs. Without
it the network had learned nothing after 5000 steps: the smooth fill leaves little to see.
"""

from pathlib import Path

import numpy
import torch
from PIL import Image

from ..data.images import shrink, to_image, to_tensor
from ..data.masks import free_form_mask
from ..data.photographs import HELD_OUT, PART, TRAINED_ON, photographs
from ..dear.network import DEAR, PRETRAINED, SMALL, dear_loss, sample_queries
from ..evaluation.baselines import filled, telea
from ..evaluation.metrics import psnr
from . import loop

SCALES = (1, 2, 4)
SAVE_EVERY = 250  # steps
SIDE = 40  # of an input crop


def crop(photos, rng, scale):
    """(input [3, 40, 40], target [3, n, n]), both in [0, 1], n = 40 times the scale, turned and mirrored at random."""
    photo = photos[rng.integers(len(photos))]
    side = round(SIDE * scale)
    zoom = rng.uniform(1, min(2, min(photo.size) / side)) if rng.random() < 0.5 else 1
    left, top = (rng.uniform(0, n - side * zoom) for n in photo.size)
    if zoom == 1:
        left, top = int(left), int(top)
    target = photo.resize((side, side), Image.BICUBIC, (left, top, left + side * zoom, top + side * zoom))
    target = target.transpose(rng.choice(list(Image.Transpose))) if rng.random() < 0.9 else target
    source = target.resize((SIDE, SIDE), Image.BICUBIC)
    channels = rng.permutation(3)
    return tuple(to_tensor(picture)[0, channels] for picture in (source, target))


def batch(photos, rng, size):
    """image [B, 3, 40, 40], mask [B, 1, 40, 40], target [B, 3, n, n], of one random scale from 1 to 4."""
    scale = rng.uniform(1, 4)
    pairs = [crop(photos, rng, scale) for _ in range(size)]
    masks = [free_form_mask((SIDE, SIDE), rng, rng.uniform(0.05, 0.4)) for _ in pairs]
    image, target = map(torch.stack, zip(*pairs, strict=True))
    return image, torch.stack(masks), target


def measure(model, photo, scale):
    """PSNR of the model and of its rival on a photograph that was shrunk by scale and lost 15 % of its pixels.

    The rival is, at scale 1, OpenCV's inpainting by Telea's method; else the bicubic interpolation of the picture
    whose holes have the mean colour.
    """
    small, shown = shrink(photo, scale)
    image = to_tensor(small)
    mask = free_form_mask(small.size[::-1], numpy.random.default_rng(0))[None]
    if scale == 1:
        rival = telea(small, mask)
    else:
        rival = to_image(filled(image, mask)).resize(shown.size, Image.BICUBIC)
    ours = to_image(model.inpaint(image, mask, shown.size[::-1]))
    return tuple(psnr(picture, shown, 0) for picture in (ours, rival))


def measured(model):
    """{"x1": (model, rival), ...} on the held-out photograph, in dB."""
    (photo,) = photographs(HELD_OUT)
    photo = photo.crop(PART)
    return {f"x{s}": tuple(round(v, 2) for v in measure(model, photo, s)) for s in SCALES}


def training_step(model, image, mask, target, queries, fast=False):
    """The loss of one step (eq. 10), at random pixels of the target."""
    coord, cell, rgb = sample_queries(target, queries)
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        encoded, kernels, seen = model.encode(image, mask)
    cell = cell if model.config.cell_decode else None
    rebuilt = model.reconstruct(image, mask, kernels.float())
    return dear_loss(model.decode(encoded.float(), seen, coord, cell), rgb, rebuilt, image)


def started(path):
    """A network with the features of another of the same size, whose pictures are still the smooth fill alone."""
    model = DEAR(SMALL)
    model.load_state_dict(DEAR.from_checkpoint(path).state_dict())
    for parameter in model.implicit.imnet.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    return model


def train(args):
    torch.manual_seed(args.seed)
    model = started(args.start) if args.start else DEAR(SMALL)
    photos = [photo for name in TRAINED_ON for photo in photographs(name)]

    def loss(rng, fast):
        return training_step(model, *batch(photos, rng, args.batch), args.queries, fast)

    # At first the gradients are small and mostly noise: Adam must not blow them up.
    return loop.optimize(model, args, loss, measured, SAVE_EVERY, eps=1e-5)


def main():
    about = __doc__.split("\n")[0]
    parser = loop.parser(about, out=PRETRAINED, steps=4500, lr=7e-4)
    parser.add_argument("--queries", type=int, default=384, help="of each crop")
    parser.add_argument("--start", type=Path, help="a checkpoint whose features to start from")
    args = parser.parse_args()
    model = train(args)
    notes = {
        "trained_on": [f"skimage.data.{name}" for name in TRAINED_ON],
        "held_out": f"skimage.data.{HELD_OUT}",
        "recipe": loop.recipe(args, f"{args.queries} queries") + (f", --start {args.start.name}" if args.start else ""),
        "psnr_and_rival": measured(model),
    }
    model.save(args.out, notes, dtype=torch.float16)
    print(notes)


if __name__ == "__main__":
    main()
