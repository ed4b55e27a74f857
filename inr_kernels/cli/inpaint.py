"""Fill the holes of a picture, and render it at any size in the same pass.

  inr-kernels inpaint in.png --mask mask.png -o out.png
  inr-kernels inpaint in.png --mask mask.png --scale 2.5 -o large.png

The mask is a picture of the same size: white is a hole, black is known; what lies between is a hole from
grey 128 (of 255) on. At the input's size the known pixels stay as they are, bit for bit (in PNG, BMP and, but for
16 bits with colour, TIFF).
Formats, greyscale, transparency, 16 bits and profiles: as `inr-kernels upscale`.

Networks, --model:

  dear    fills better of the two, and is the one to enlarge with. It sees the picture in tiles with their
          surroundings; with --tile 0 every known pixel attends to every pixel, as the paper has it: twice the
          pixels then take four times the time.
  in2     is several times faster: it sees the whole picture at once, in time in proportion to the pixels, without
          tiles; sides from 9 pixels on. At a larger size all pixels are its own guess: take it without --scale.
  PATH    a checkpoint of either: the file says of which.

Both that ship are small and were trained on a few photographs, in2 for so short a time that its strokes stay visible:
for strokes and scratches, not for whole objects.
"""

import contextlib
import dataclasses
from pathlib import Path

from tqdm import tqdm

from inr_kernels._core import dispatch
from inr_kernels.models import DEAR, IN2, DEARConfig, IN2Config
from inr_kernels.models.common import checkpoints

from . import pictures
from .parsing import UsageError, positive

NETWORKS = {"dear": DEAR, "in2": IN2}
TILE = 32  # DEAR's, by default


def add_arguments(parser):
    """The arguments of `inr-kernels inpaint`."""
    parser.add_argument("input", type=Path, help="a picture")
    parser.add_argument("--mask", type=Path, required=True, help="a picture of the same size; white: to be filled")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a picture to write")
    pictures.add_size(parser, required=False)
    names = ", ".join(NETWORKS)
    parser.add_argument("--model", default="dear", help=f"{names} or a checkpoint (.safetensors); default: dear")
    parser.add_argument(
        "--tile", type=tile, metavar="PIXELS", help=f"DEAR's: side of a tile, 0: all at once; default: {TILE}"
    )
    pictures.add_machine(parser, megapixels=25)


def tile(text):
    """A side in pixels, or 0."""
    return 0 if text == "0" else positive(int)(text)


def run(args):
    """Reads both, fills and renders in bands, writes."""
    pictures.prepare(args, args.input, args.mask)
    picture = pictures.read(args.input, args)
    mask = read_mask(args, picture)
    model = load(args.model)
    options = {}
    if isinstance(model, DEAR):
        options["tile"] = (TILE if args.tile is None else args.tile) or None
    elif args.tile is not None:
        raise UsageError(f"--tile is DEAR's: IN2 sees the whole picture; got --tile {args.tile}")
    size = pictures.output_size(picture, args)
    needs = model.bytes_per_pixel(**options), model.bytes_per_output_pixel
    pictures.check_output(picture, size, args.output, args.workspace, *needs)
    chosen = dispatch.backend(args.backend) if args.backend else contextlib.nullcontext()
    with chosen, tqdm(total=size[0], unit="row", disable=args.quiet) as bar:
        colour = model.to(args.device).inpaint(
            picture.colour.expand(-1, 3, -1, -1).to(args.device),
            mask.to(args.device),
            size,
            workspace=args.workspace,
            progress=lambda done, rows: bar.update(done - bar.n),
            **options,
        )
    pictures.write(args.output, picture, colour)


def load(name):
    """The shipped network of that name, or the one whose checkpoint has that path."""
    if name in NETWORKS:
        return NETWORKS[name].pretrained()
    return checkpoints.load(name, "a DEAR or IN2", network_of)


def network_of(config):
    """The network whose config has these fields, and these values in them."""
    for network, kind in ((DEAR, DEARConfig), (IN2, IN2Config)):
        if config.keys() <= {field.name for field in dataclasses.fields(kind)}:
            return network(kind(**config))
    raise ValueError("its config is neither's")


def read_mask(args, picture):
    """[1, 1, h, w] of zeros and ones."""
    mask = pictures.read(args.mask, args).colour.mean(1, keepdim=True)
    (had, wanted) = ("x".join(map(str, p.shape[2:])) for p in (mask, picture.colour))
    if had != wanted:
        raise ValueError(f"{args.mask}: the mask must have the input's size {wanted}; got {had}")
    return (mask >= 0.5).to(picture.colour.dtype)
