"""Trains a small DEAR, as the shipped checkpoint: `python -m inr_kernels.models.training.dear`.

DEAR's training (low-resolution images with missing pixels in, full images out, L1 + 0.01 L1, Adam) on crops of
photographs of scikit-image with free-form masks, on a CPU. The photograph `HELD_OUT` is not used: the tests measure on
it. The shipped file is the result of `--bf16 --start dear_from_grey.safetensors`, 19 minutes on one core. That start is
an earlier checkpoint, trained for 3200 steps with fill="zeros". Without it the network had learned nothing after 5000
steps: the smooth fill leaves little to learn from.
"""

from argparse import Namespace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy
import torch

from ..data.crops import dear_batch
from ..data.photographs import HELD_OUT, PART, TRAINED_ON, photographs
from ..dear.losses import dear_loss, sample_queries
from ..dear.network import DEAR, SMALL
from ..evaluation.run import compare_joint
from . import loop

SCALES = (1, 2, 4)
SAVE_EVERY = 250  # steps


def measured(model: DEAR) -> dict[str, tuple[float, ...]]:
    """{"x1": (network, baseline), ...} on the middle of the held-out photograph, in dB."""
    (photo,) = photographs(HELD_OUT)
    photo = photo.crop(PART)
    return {f"x{s}": tuple(round(v, 2) for v in compare_joint(model, photo, s)) for s in SCALES}


def training_step(
    model: DEAR, image: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, queries: int, use_bfloat16: bool = False
) -> torch.Tensor:
    """Returns the loss of one step (eq. 10), at random pixels of the target.

    Args:
        image, mask, target: [B, 3, h, w], [B, 1, h, w] and [B, 3, n, n], as `dear_batch` draws them.
        queries: pixels of each target.
        use_bfloat16: encode in bfloat16, by autocast.
    """
    coord, cell, rgb = sample_queries(target, queries)
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bfloat16):
        encoded, kernels, seen = model.encode(image, mask)
    colours = model.decode_at(encoded.float(), seen, coord, cell if model.config.cell_decode else None)
    return dear_loss(colours, rgb, model.reconstruct(image, mask, kernels.float()), image)


def load_start(path: str | PathLike[str]) -> DEAR:
    """Returns a network with the parameters of a checkpoint and a zeroed last layer: its output is the smooth fill."""
    model = DEAR(SMALL)
    model.load_state_dict(DEAR.from_checkpoint(path).state_dict())
    last: Any = model.implicit.imnet.layers
    for parameter in last[-1].parameters():
        torch.nn.init.zeros_(parameter)
    return model


def train(args: Namespace) -> DEAR:
    """Trains a network, new or from `load_start`, with the options of `main`."""
    torch.manual_seed(args.seed)
    model = load_start(args.start) if args.start else DEAR(SMALL)
    photos = photographs(*TRAINED_ON)

    def loss(rng: numpy.random.Generator, use_bfloat16: bool) -> torch.Tensor:
        return training_step(model, *dear_batch(photos, rng, args.batch), args.queries, use_bfloat16)

    # The first gradients are small and mostly noise: a larger eps keeps Adam from amplifying them.
    return loop.optimize(model, args, loss, measured, SAVE_EVERY, eps=1e-5)


def main() -> None:
    """Runs the command line."""
    about = (__doc__ or "").split("\n")[0]
    parser = loop.parser(about, out=DEAR.PRETRAINED, steps=4500, lr=7e-4)
    parser.add_argument("--queries", type=int, default=384, help="of each crop")
    parser.add_argument("--start", type=Path, help="a checkpoint whose features to start from")
    args = parser.parse_args()
    model = train(args)
    options = f", --start {args.start.name}" if args.start else ""
    notes = loop.notes(args, f"{args.queries} queries", options, "psnr_and_baseline", measured(model))
    model.save(args.out, notes, dtype=torch.float16)
    print(notes)


if __name__ == "__main__":
    main()
