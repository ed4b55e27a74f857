"""Fill the missing pixels of an image, optionally at a larger size.

  inr-kernels inpaint in.png --mask mask.png -o out.png
  inr-kernels inpaint in.png --mask mask.png --scale 2.5 -o large.png

The mask is an image of the same size: white pixels are filled, black ones are kept; grey counts as white from 128 (of
255) on. At the input's size the kept pixels do not change (in PNG, BMP and, except for 16-bit colour, TIFF).
Strokes on a transparent layer work, too: the mask is brightness times opacity.
Formats, greyscale, transparency, 16 bits and colour profiles: as in `inr-kernels upscale`.

Networks, --model:

  dear    the better of the two that ship, and the one for larger sizes. It encodes the image in tiles with their
          surroundings; with --tile 0 every known pixel attends to every pixel, as in the paper, and twice the pixels
          take four times as long.
  in2     several times faster: it sees the whole image at once, in time proportional to the number of pixels.
          Sides of at least 9 pixels. At a larger size every pixel is predicted, with poor quality: use it without
          --scale.
  PATH    a checkpoint of DEAR, IN2 or LaMa: a .safetensors file of this package, or LaMa's own .ckpt. LaMa fills at
          the input's size only.

Both networks that ship are small and were trained on a few photographs, in2 so briefly that its fills stay visible:
use them for scratches and strokes, not for whole objects.
"""

import contextlib
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from tqdm import tqdm

from inr_kernels._core import dispatch
from inr_kernels.models import DEAR, IN2, Inpainter, from_checkpoint
from inr_kernels.models.data.images import Picture

from . import pictures
from .parsing import UsageError, positive

NETWORKS: dict[str, type[Inpainter]] = {"dear": DEAR, "in2": IN2}
TILE = 32  # DEAR's default


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of `inr-kernels inpaint`."""
    parser.add_argument("input", type=Path, help="an image")
    parser.add_argument("--mask", type=Path, required=True, help="an image of the same size; white: fill")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the image to write")
    pictures.add_size(parser, required=False)
    names = ", ".join(NETWORKS)
    parser.add_argument("--model", default="dear", help=f"{names} or a checkpoint; default: dear")
    parser.add_argument(
        "--tile", type=tile, metavar="PIXELS", help=f"DEAR only: side of a tile, 0: whole image; default: {TILE}"
    )
    pictures.add_machine(parser, megapixels=25)


def tile(text: str) -> int:
    """Parses a side in pixels, or 0."""
    return 0 if text == "0" else positive(int)(text)


def run(args: Namespace) -> None:
    """Reads the image and its mask, fills and renders in bands of rows, and writes the result."""
    pictures.prepare(args, args.input, args.mask)
    picture = pictures.read(args.input, args)
    mask = read_mask(args, picture)
    model = load(args.model)
    options = {}
    if isinstance(model, DEAR):
        options["tile"] = (TILE if args.tile is None else args.tile) or None
    elif args.tile is not None:
        raise UsageError(f"--tile applies to DEAR only, not to {model.NETWORK}; got --tile {args.tile}")
    size = pictures.output_size(picture, args)
    needs = model.bytes_per_pixel(**options), model.bytes_per_output_pixel
    pictures.check_output(picture, size, args.output, args.workspace, *needs)
    backend = dispatch.backend(args.backend) if args.backend else contextlib.nullcontext()
    with backend, tqdm(total=size[0], unit="row", disable=args.quiet) as bar:
        colour = model.to(args.device).inpaint(
            pictures.network_input(picture).to(args.device),
            mask.to(args.device),
            size,
            workspace=args.workspace,
            progress=lambda done, rows: bar.update(done - bar.n),
            **options,
        )
    pictures.write(args.output, picture, colour)


def load(name: str) -> Inpainter:
    """Opens the shipped network of that name, or the checkpoint at that path.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a checkpoint, or one of a network that does not inpaint.
    """
    if name in NETWORKS:
        return NETWORKS[name].pretrained()
    model = from_checkpoint(name)
    if not isinstance(model, Inpainter):
        raise ValueError(f"{name} is a {model.NETWORK} checkpoint, which does not inpaint; use inr-kernels upscale")
    return model


def read_mask(args: Namespace, picture: Picture) -> torch.Tensor:
    """Reads the mask, brightness times opacity, as [1, 1, h, w] of zeros and ones, in the image's dtype."""
    drawn = pictures.read(args.mask, args)
    mask = drawn.colour.mean(1, keepdim=True)
    if drawn.alpha is not None:  # strokes on a transparent layer
        mask = mask * drawn.alpha
    found, expected = ("x".join(map(str, p.shape[2:])) for p in (mask, picture.colour))
    if found != expected:
        raise ValueError(f"{args.mask}: the mask must have the input's size {expected}; got {found}")
    holes = (mask >= 0.5).to(picture.colour.dtype)
    top = 2**drawn.depth - 1
    smallest, largest = (f"{value * top:.0f} of {top}" for value in (mask.min(), mask.max()))
    if not holes.any():
        pictures.say(args.mask, f"the mask has no hole: its largest value is {largest}")
    elif holes.all():
        pictures.say(args.mask, f"the mask covers the whole image: its smallest value is {smallest}")
    return holes
