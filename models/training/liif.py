"""Trains a small LIIF, as the shipped checkpoint: `python -m inr_kernels.models.training.liif`.

LIIF's training (random crops, scales 1 to 4, random pixels as queries, L1, Adam) on photographs of scikit-image, on a
CPU. The photograph `HELD_OUT` is not used: the demo and the tests measure on it. The shipped file is the result of
`--bf16`: 40 minutes on one core of a processor with bfloat16 instructions.
"""

from argparse import Namespace

import numpy
import torch

from ..data.crops import liif_batch
from ..data.photographs import HELD_OUT, TRAINED_ON, photographs
from ..evaluation.run import compare_upscaling
from ..liif.network import LIIF, SMALL
from . import loop

SCALES = (2, 2.7, 3.7)
SAVE_EVERY = 500  # steps


def measured(model: LIIF) -> dict[str, tuple[float, ...]]:
    """{"x2": (network, bicubic), ...} on the held-out photograph, in dB."""
    (photo,) = photographs(HELD_OUT)
    return {f"x{s}": tuple(round(v, 2) for v in compare_upscaling(model, photo, s)) for s in SCALES}


def train(args: Namespace) -> LIIF:
    """Trains a new network with the options of `main`."""
    torch.manual_seed(args.seed)
    model = LIIF(SMALL)
    photos = photographs(*TRAINED_ON)

    def loss(rng: numpy.random.Generator, use_bfloat16: bool) -> torch.Tensor:
        inp, coord, cell, rgb = liif_batch(photos, rng, args.batch, args.queries)
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bfloat16):
            feat = model.gen_feat(inp)
        model.feat = feat.float()
        return (model.query_rgb(coord, cell) - rgb).abs().mean()

    return loop.optimize(model, args, loss, measured, SAVE_EVERY)


def main() -> None:
    """Runs the command line."""
    about = (__doc__ or "").split("\n")[0]
    parser = loop.parser(about, out=LIIF.PRETRAINED, steps=7000, lr=1e-3)
    parser.add_argument("--queries", type=int, default=1024, help="of each crop")
    args = parser.parse_args()
    model = train(args)
    notes = loop.notes(args, f"{args.queries} queries", "", "psnr_and_bicubic", measured(model))
    model.save(args.out, notes)
    print(notes)


if __name__ == "__main__":
    main()
