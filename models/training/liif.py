"""The recipe of the shipped checkpoint: `python -m inr_kernels.models.training.liif`.

LIIF's training (random crops, scales 1 to 4, random pixels as queries, L1, Adam) on photographs of
scikit-image, on a CPU. `HELD_OUT` takes no part in it: the demo and the tests measure on that one.
The shipped file is what `--bf16` gives: 40 minutes on one core of a processor that has bfloat16.
"""

import math

import numpy
import torch
from PIL import Image

from ..data.images import shrink, to_image, to_tensor
from ..data.photographs import HELD_OUT, TRAINED_ON, photographs
from ..evaluation.metrics import psnr
from ..liif.network import LIIF, PRETRAINED, SMALL
from . import loop

SCALES = (2, 2.7, 3.7)
SAVE_EVERY = 500  # steps
SIDE, ZOOM = 48, 2  # of an input patch; how far a photograph is shrunk at most to make sharper ones


def patch(photos, rng):
    """One crop: (input [3, 48, 48], target [n, n, 3]), both in [-1, 1], n = 48 times a random scale."""
    photo = photos[rng.integers(len(photos))]
    side = round(SIDE * rng.uniform(1, 4))
    zoom = rng.uniform(1, min(ZOOM, min(photo.size) / side)) if rng.random() < 0.5 else 1
    left, top = (rng.uniform(0, n - side * zoom) for n in photo.size)
    if zoom == 1:
        left, top = int(left), int(top)
    box = (left, top, left + side * zoom, top + side * zoom)
    target = photo.resize((side, side), Image.BICUBIC, box)
    source = target.resize((SIDE, SIDE), Image.BICUBIC)
    flips = [slice(None, None, step) for step in rng.choice([-1, 1], 2)]
    axes = (1, 0, 2) if rng.random() < 0.5 else (0, 1, 2)
    channels = rng.permutation(3)
    source, target = (
        torch.from_numpy(numpy.asarray(p)[tuple(flips)][..., channels].transpose(axes).copy()) / 127.5 - 1
        for p in (source, target)
    )
    return source.permute(2, 0, 1), target


def batch(photos, rng, size, queries):
    """inp [B, 3, 48, 48], coord [B, Q, 2], cell [B, 2], rgb [B, Q, 3]."""
    parts = []
    for _ in range(size):
        source, target = patch(photos, rng)
        n = len(target)
        pixels = torch.from_numpy(rng.integers(n, size=(queries, 2)))
        rgb = target[pixels[:, 0], pixels[:, 1]]
        parts.append((source, (2 * pixels + 1) / n - 1, torch.full((2,), 2 / n), rgb))
    return map(torch.stack, zip(*parts, strict=True))


def measure(model, photo, scale):
    """PSNR of the model and of bicubic interpolation on a photograph that was shrunk by scale."""
    small, shown = shrink(photo, scale)
    ours = to_image(model.upscale(to_tensor(small), size=shown.size[::-1]))
    border = math.ceil(scale)
    return tuple(psnr(p, shown, border) for p in (ours, small.resize(shown.size, Image.BICUBIC)))


def measured(model):
    """{"x2": (model, bicubic), ...} on the held-out photograph, in dB."""
    (photo,) = photographs(HELD_OUT)
    return {f"x{s}": tuple(round(v, 2) for v in measure(model, photo, s)) for s in SCALES}


def train(args):
    torch.manual_seed(args.seed)
    model = LIIF(SMALL)
    photos = [photo for name in TRAINED_ON for photo in photographs(name)]

    def loss(rng, fast):
        inp, coord, cell, rgb = batch(photos, rng, args.batch, args.queries)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            feat = model.gen_feat(inp)
        model.feat = feat.float()
        return (model.query_rgb(coord, cell) - rgb).abs().mean()

    return loop.optimize(model, args, loss, measured, SAVE_EVERY)


def main():
    about = __doc__.split("\n")[0]
    parser = loop.parser(about, out=PRETRAINED, steps=7000, lr=1e-3)
    parser.add_argument("--queries", type=int, default=1024, help="of each crop")
    args = parser.parse_args()
    model = train(args)
    notes = {
        "trained_on": [f"skimage.data.{name}" for name in TRAINED_ON],
        "held_out": f"skimage.data.{HELD_OUT}",
        "recipe": loop.recipe(args, f"{args.queries} queries"),
        "psnr_and_bicubic": measured(model),
    }
    model.save(args.out, notes)
    print(notes)


if __name__ == "__main__":
    main()
