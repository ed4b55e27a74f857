"""Shared by `upscale` and `inpaint`: checks of the work, reading and writing of pictures, and the progress bar."""

import argparse
import contextlib
import contextvars
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from inr_kernels._core import dispatch
from inr_kernels._core.files import replace_file
from inr_kernels._core.text import printable
from inr_kernels.models.common.progress import Progress
from inr_kernels.models.common.smooth import smooth_fill
from inr_kernels.models.data import images

from .machine import free_memory
from .names import STDIN, STDOUT, Names
from .parsing import UsageError


def prepare_computation(args: argparse.Namespace) -> None:
    """Checks device and backend, and sets the number of threads."""
    if sys.stderr is None:  # closed: a progress bar cannot be shown
        args.quiet = True
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU")
    if dispatch.requested_backend(args.backend):  # raises now if it cannot run
        op = dispatch.OPS["local_implicit"]
        op.choose(args.backend, op.facts(torch.empty(1, 1, 1, 1, dtype=torch.float32, device=args.device)))
    if args.threads:
        torch.set_num_threads(args.threads)


_notes: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("notes", default=None)


@contextlib.contextmanager
def collected_notes() -> Iterator[list[str]]:
    """In the block, in this thread, what `say` would print goes into the list instead."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def say(name: str, message: str) -> None:
    """Prints one line about a file on stderr, if it is open, above a progress bar."""
    notes = _notes.get()
    if notes is not None:
        notes.append(f"{printable(name)}: {printable(message)}")
    elif sys.stderr is not None:
        tqdm.write(f"inr-kernels: {printable(name)}: {message}", file=sys.stderr)


class Source(NamedTuple):
    """A picture that was read, but not decoded. label: what it is and its name, for errors."""

    name: str
    label: str
    data: bytes
    header: images.Header
    max_pixels: float

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.header.height, self.header.width

    @property
    def decoding(self) -> int:
        """Bytes that decoding needs: up to 16-bit samples, Pillow's copy, float32 and a copy of that."""
        channels = 4 if self.header.alpha else 3
        return math.prod(self.size) * channels * (2 + 2 + 4 + 4)

    def decode(self) -> images.Picture:
        """Decodes the picture; says on stderr what decoding changed or dropped."""
        picture = images.read(self.data, self.max_pixels, self.label)
        for note in picture.notes:
            say(self.name, note)
        return picture


@dataclass(eq=False)  # each is its own: they are keys
class Job:
    """A picture on its way from its file to the output.

    Attributes:
        names: of its files.
        source: the picture's file.
        size: (height, width) of the output.
        need: bytes of memory that the work needs; set when they are known.
        drawn: the mask's file, if there is one.
        picture, mask: decoded; mask [1, 1, h, w].
    """

    names: Names
    source: Source
    size: tuple[int, int]
    need: float = field(init=False)
    drawn: Source = field(init=False)
    picture: images.Picture = field(init=False)
    mask: torch.Tensor = field(init=False)

    @property
    def decoding(self) -> int:
        """Bytes that decoding its files needs, which is more than what they take afterwards."""
        files = [self.source, *([self.drawn] if hasattr(self, "drawn") else [])]
        return sum(file.decoding + len(file.data) for file in files)


def read(what: str, name: str, args: argparse.Namespace) -> Source:
    """Reads a file, pipe, device or the standard input, once.

    what: "input" or "mask", for errors.
    """
    label = f"{what} {name}"
    try:
        data = sys.stdin.buffer.read() if name in STDIN else Path(name).read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, label) from error
    max_pixels = args.max_megapixels * 1e6
    return Source(name, label, data, images.read_header(data, max_pixels, label), max_pixels)


def network_input(picture: images.Picture) -> torch.Tensor:
    """The picture as a network takes it, [1, 3, h, w].

    Transparent pixels get a smooth continuation of the visible colours, as an enlarged edge mixes both.
    """
    colour = picture.colour.expand(-1, 3, -1, -1)
    if picture.alpha is None:
        return colour
    hidden = (picture.alpha == 0).float()
    return torch.where(hidden > 0, smooth_fill(colour * (1 - hidden), hidden), colour)


def shown(size: tuple[int, int]) -> str:
    """(height, width) as "WIDTHxHEIGHT", the order in which people read and type sizes."""
    return f"{size[1]}x{size[0]}"


def output_size(source: Source, args: argparse.Namespace) -> tuple[int, int]:
    """The requested (height, width), which must not be smaller than the input."""
    height, width = source.size
    scale = args.scale or 1
    size = args.size or (round(min(height * scale, 1e9)), round(min(width * scale, 1e9)))
    if size[0] < height or size[1] < width:
        raise UsageError(f"output must not be smaller than the input's {shown(source.size)}; got {requested(args)}")
    return size


def requested(args: argparse.Namespace) -> str:
    """The option that gives the output's size, as it was typed."""
    return f"--scale {args.scale:g}" if args.scale else f"--size {shown(args.size)}"


def check_work(
    job: Job, args: argparse.Namespace, input_bytes: int, output_bytes: int = 0, pixels: int | None = None
) -> float:
    """Checks that the file format can store the output, and that the work stays within the limit and the free memory.

    Returns the estimated bytes of all that is needed.

    input_bytes, output_bytes: that the network needs for each pixel, in addition to the working memory.
    pixels: that the network sees at once, of the input and the output; None: all.
    """
    source, size, kind = job.source, job.size, images.FORMATS[job.names.extension]
    longest = images.MAX_SIDE.get(kind, math.inf)
    if max(size) > longest:
        raise ValueError(f"{kind} holds at most {longest} pixels a side; got {shown(size)}")
    channels = 4 if source.header.alpha else 3
    # The output in float32, a copy of it during rounding, and up to 16-bit integers.
    writing = channels * (4 + 4 + 2)
    inputs, outputs = math.prod(source.size), math.prod(size)
    if pixels is None:
        need = max(source.decoding, inputs * input_bytes) + outputs * (writing + output_bytes)
    else:
        need = source.decoding + inputs * writing + pixels * (input_bytes + output_bytes)
    need += args.workspace
    free = unused_memory()
    if need <= min(free, args.max_memory):
        return need
    message = (
        f"an output of {shown(size)} from an input of {shown(source.size)} needs about {need / 1e9:.1f} GB of memory"
    )
    if need > args.max_memory:
        message += f", more than the limit of {args.max_memory / 1e9:g} GB; --max-memory raises it"
    raise ValueError(message + (f", but {free / 1e9:.1f} GB are free" if need > free else ""))


def unused_memory() -> float:
    """Bytes that this process can still allocate, as far as is known."""
    available = free_memory()
    return math.inf if available is None else available


def check_transparency(picture: images.Picture, extension: str) -> None:
    """Checks that the output's format can store the picture's transparent pixels."""
    kind = images.FORMATS[extension]
    if picture.alpha is not None and kind in images.OPAQUE and picture.alpha.min() < 1:
        raise ValueError(f"{kind} holds no transparency, which the input has; use PNG or WebP")


@contextlib.contextmanager
def computing(args: argparse.Namespace) -> Iterator[Progress]:
    """Shows a progress bar on terminals; gives the function that a network calls with the work done and all work.

    Errors: as `memory_options`.
    """
    form = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
    with memory_options(args), tqdm(total=1, bar_format=form, disable=args.quiet) as bar:
        yield lambda done, total: bar.update(done / total - bar.n)


@contextlib.contextmanager
def memory_options(args: argparse.Namespace) -> Iterator[None]:
    """In the block, a workspace or a limit of memory that is too small becomes a mistake on the command line."""
    try:
        yield
    except ValueError as error:
        if found := re.match(r"workspace must be at least (\d+) bytes", str(error)):
            minimum, got = math.ceil(int(found[1]) / 2**20), args.workspace >> 20
            raise UsageError(f"argument --workspace: must be at least {minimum} for these sizes; got {got}") from error
        if found := re.match(r"max_memory must be at least (\d+) bytes .*; got (-?\d+)", str(error)):
            minimum_gb = (args.max_memory + int(found[1]) - int(found[2])) / 1e9
            raise UsageError(f"argument --max-memory: must be at least {minimum_gb:.3g} for this image") from error
        raise


def write(job: Job, colour: torch.Tensor) -> None:
    """Writes the output, grey if the input was, with the input's transparency, bit depth and metadata.

    What the format cannot hold is named on stderr.

    colour: [1, 3, H, W] in [0, 1].
    """
    names, picture = job.names, job.picture
    if picture.colour.shape[1] == 1:
        colour = colour.mean(1, keepdim=True)
    alpha = picture.alpha
    if alpha is not None and alpha.shape[2:] == colour.shape[2:]:  # transparent pixels keep their colours, too
        colour = torch.where(alpha == 0, picture.colour, colour.float().cpu())
    if alpha is not None and alpha.shape[2:] != colour.shape[2:]:
        alpha = F.interpolate(alpha, colour.shape[2:], mode="bicubic").clamp_(0, 1)
    output = images.Picture(colour.float().cpu(), alpha, picture.depth, picture.metadata)
    data, notes = images.encode(output, names.extension)
    if names.output in STDOUT:
        _write_standard_output(data)
    else:
        replace_file(names.output, data)
    for note in notes:
        say(names.output, note)


def _write_standard_output(data):
    """Without the buffer of sys.stdout, which would be written once more, and fail again, when the process ends."""
    try:
        with open(sys.stdout.fileno(), "wb", closefd=False) as file:
            file.write(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "the standard output") from error
