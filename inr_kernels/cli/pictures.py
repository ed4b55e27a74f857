"""What the commands share that turn a picture into a larger one: their arguments, their checks, their output."""

import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from inr_kernels._core.dispatch import OPS
from inr_kernels.models.data import images

from .machine import free_memory
from .parsing import UsageError, megabytes, positive, size

MOST_THREADS = 1024  # torch dies of some ten thousand


def add_size(parser, required):
    """--scale or --size."""
    target = parser.add_mutually_exclusive_group(required=required)
    target.add_argument("--scale", type=positive(float), help="at least 1, any fraction")
    target.add_argument("--size", type=size, metavar="HxW", help="of the output, in pixels")


def add_machine(parser, megapixels):
    """How to compute, and how much."""
    backends = list(OPS["local_implicit"].backends)
    parser.add_argument("--backend", choices=backends, help="default: the fastest that can run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--workspace",
        type=megabytes,
        default="256",
        metavar="MB",
        help="memory beside pictures and features; default: 256",
    )
    parser.add_argument("--threads", type=positive(int), help="default: torch's choice")
    parser.add_argument(
        "--max-megapixels", type=positive(float), default=megapixels, help="of the input; default: %(default)s"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(quiet=None)  # tqdm's word for: a bar on terminals alone


def prepare(args, *inputs):
    """Refuses an output that cannot be written or is one of the inputs, and sets the machine up."""
    suffix = args.output.suffix.lower()
    if suffix not in images.FORMATS:
        raise UsageError(f"output must end in {' '.join(images.FORMATS)}; got {args.output.name}")
    for path in inputs:
        if args.output.exists() and path.exists() and os.path.samefile(path, args.output):
            raise UsageError(f"output must be another file than the input; got {args.output}")
    if args.output.is_dir():
        raise ValueError(f"{args.output}: is a folder; the output must be a file")
    if not args.output.parent.is_dir():
        raise ValueError(f"{args.output.parent}: the folder of the output does not exist")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    if args.threads:
        if args.threads > MOST_THREADS:
            raise UsageError(f"--threads must be at most {MOST_THREADS}; got {args.threads}")
        torch.set_num_threads(args.threads)


def read(path, args):
    """The picture, and a word if it is one frame of several."""
    picture = images.read(path, args.max_megapixels * 1e6)
    if picture.frames > 1:
        print(f"inr-kernels: takes the first of {picture.frames} frames", file=sys.stderr)
    return picture


def output_size(picture, args):
    """(height, width) as asked, at least those of the input."""
    had = tuple(picture.colour.shape[2:])
    scaled = [n * (args.scale or 1) for n in had]
    wanted = args.size or tuple(round(min(n, 1e9)) for n in scaled)
    if any(new < old for new, old in zip(wanted, had, strict=True)):
        got = f"--scale {args.scale:g}" if args.scale else f"--size {wanted[0]}x{wanted[1]}"
        raise UsageError(f"output must not be smaller than the input's {had[0]}x{had[1]}; got {got}")
    return wanted


def check_output(picture, size, path, workspace, input_bytes, output_bytes=0):
    """The format can hold the output, and the machine compute it; input_bytes, output_bytes: needed for a pixel."""
    height, width = size
    kind = images.FORMATS[Path(path).suffix.lower()]
    longest = images.LONGEST.get(kind, math.inf)
    if max(height, width) > longest:
        raise ValueError(f"{kind} holds at most {longest} pixels a side; got {height}x{width}")
    if picture.alpha is not None and kind in images.OPAQUE and picture.alpha.min() < 1:
        raise ValueError(f"{kind} holds no transparency, which the input has; .png and .webp do")
    channels = 3 if picture.alpha is None else 4
    # The output in float32, once more on its way to integers, and these.
    need = height * width * (channels * (4 + 4 + 2) + output_bytes)
    need += picture.colour[0, 0].numel() * input_bytes + workspace
    free = free_memory()
    if free is not None and need > free:
        raise ValueError(
            f"an output of {height}x{width} needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        )


def write(path, picture, colour):
    """The rendered colours, grey again if the picture was, with its transparency, depth and profile."""
    if picture.colour.shape[1] == 1:
        colour = colour.mean(1, keepdim=True)
    alpha = picture.alpha
    if alpha is not None and alpha.shape[2:] != colour.shape[2:]:
        alpha = F.interpolate(alpha, colour.shape[2:], mode="bicubic").clamp_(0, 1)
    images.write(path, images.Picture(colour.float().cpu(), alpha, picture.depth, picture.icc))
