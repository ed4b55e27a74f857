"""Shared by `upscale` and `inpaint`: options, checks, reading and writing of pictures."""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from inr_kernels._core.dispatch import OPS
from inr_kernels.models.common.files import check_writable
from inr_kernels.models.data import images
from inr_kernels.models.dear.blocks import smooth_fill

from .machine import free_memory
from .parsing import UsageError, megabytes, positive, size

MAX_THREADS = 1024  # torch crashes with some ten thousand


def add_size(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds --scale and --size, of which only one may be given."""
    target = parser.add_mutually_exclusive_group(required=required)
    target.add_argument("--scale", type=positive(float), metavar="FACTOR", help="how many times larger, e.g. 2 or 3.7")
    target.add_argument(
        "--size", type=size, metavar="HxW", help="height and width of the output in pixels, e.g. 1080x1920"
    )


def add_machine(parser: argparse.ArgumentParser, megapixels: int) -> None:
    """Adds the options that say how to compute, and within which limits; megapixels: the default limit of the input."""
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--backend",
        choices=list(OPS["local_implicit"].backends),
        help="implementation to compute with; default: the first that can run here (see `inr-kernels info`)",
    )
    group.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute; default: cpu")
    group.add_argument(
        "--workspace",
        type=megabytes,
        default="256",
        metavar="MB",
        help="working memory in megabytes, in addition to the pictures and the network's features; default: 256",
    )
    group.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads; default: PyTorch's choice")
    group.add_argument(
        "--max-megapixels",
        type=positive(float),
        default=megapixels,
        metavar="N",
        help="refuse larger inputs; default: %(default)s",
    )
    group.add_argument("--quiet", action="store_true", help="show no progress bar")
    parser.set_defaults(quiet=None)  # tqdm then shows a bar on terminals only


def prepare(args: argparse.Namespace, *inputs: Path) -> None:
    """Checks that the output can be written and is not one of the inputs, and sets the number of threads."""
    suffix = args.output.suffix.lower()
    if suffix not in images.FORMATS:
        raise UsageError(f"output must end in {' '.join(images.FORMATS)}; got {args.output.name}")
    for path in inputs:
        if args.output.exists() and path.exists() and os.path.samefile(path, args.output):
            raise UsageError(f"output must be another file than the input; got {args.output}")
    check_writable(args.output)
    if sys.stderr is None:  # closed: a progress bar cannot be shown
        args.quiet = True
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU")
    if args.threads:
        if args.threads > MAX_THREADS:
            raise UsageError(f"--threads must be at most {MAX_THREADS}; got {args.threads}")
        torch.set_num_threads(args.threads)


def say(path: Path, message: str) -> None:
    """Prints one line about a file on stderr, if it is open."""
    if sys.stderr is not None:
        print(f"inr-kernels: {path}: {message}", file=sys.stderr)


def read(path: Path, args: argparse.Namespace) -> images.Picture:
    """Reads a picture; says on stderr what reading changed or dropped."""
    picture = images.read(path, args.max_megapixels * 1e6)
    for note in picture.notes:
        say(path, note)
    return picture


def network_input(picture: images.Picture) -> torch.Tensor:
    """The picture as a network takes it, [1, 3, h, w].

    Transparent pixels get a smooth continuation of the visible colours, as an enlarged edge mixes both.
    """
    colour = picture.colour.expand(-1, 3, -1, -1)
    if picture.alpha is None:
        return colour
    hidden = (picture.alpha == 0).float()
    return torch.where(hidden > 0, smooth_fill(colour * (1 - hidden), hidden), colour)


def output_size(picture: images.Picture, args: argparse.Namespace) -> tuple[int, int]:
    """The requested (height, width), which must not be smaller than the input."""
    height, width = picture.colour.shape[2:]
    scale = args.scale or 1
    size = args.size or (round(min(height * scale, 1e9)), round(min(width * scale, 1e9)))
    if size[0] < height or size[1] < width:
        got = f"--scale {args.scale:g}" if args.scale else f"--size {size[0]}x{size[1]}"
        raise UsageError(f"output must not be smaller than the input's {height}x{width}; got {got}")
    return size


def check_output(
    picture: images.Picture, size: tuple[int, int], path: Path, workspace: int, input_bytes: int, output_bytes: int = 0
) -> None:
    """Checks that the file format can store the output and that there is enough memory to compute it.

    workspace: bytes of working memory. input_bytes, output_bytes: that the network needs for each pixel.
    """
    height, width = size
    kind = images.FORMATS[Path(path).suffix.lower()]
    longest = images.MAX_SIDE.get(kind, math.inf)
    if max(height, width) > longest:
        raise ValueError(f"{kind} holds at most {longest} pixels a side; got {height}x{width}")
    if picture.alpha is not None and kind in images.OPAQUE and picture.alpha.min() < 1:
        raise ValueError(f"{kind} holds no transparency, which the input has; use .png or .webp")
    channels = 3 if picture.alpha is None else 4
    # The output in float32, a copy of it during rounding, and up to 16-bit integers.
    need = height * width * (channels * (4 + 4 + 2) + output_bytes)
    need += picture.colour[0, 0].numel() * input_bytes + workspace
    free = free_memory()
    if free is not None and need > free:
        raise ValueError(
            f"an output of {height}x{width} needs about {need / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free"
        )


def write(path: Path, picture: images.Picture, colour: torch.Tensor) -> None:
    """Writes the output, grey if the input was, with the input's transparency, bit depth and metadata.

    What the format cannot hold is named on stderr.

    colour: [1, 3, H, W] in [0, 1].
    """
    if picture.colour.shape[1] == 1:
        colour = colour.mean(1, keepdim=True)
    alpha = picture.alpha
    if alpha is not None and alpha.shape[2:] == colour.shape[2:]:  # transparent pixels keep their colours, too
        colour = torch.where(alpha == 0, picture.colour, colour.float().cpu())
    if alpha is not None and alpha.shape[2:] != colour.shape[2:]:
        alpha = F.interpolate(alpha, colour.shape[2:], mode="bicubic").clamp_(0, 1)
    output = images.Picture(colour.float().cpu(), alpha, picture.depth, picture.metadata)
    for note in images.write(path, output):
        say(path, note)
