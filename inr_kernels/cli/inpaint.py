"""The command `inr-kernels inpaint`."""

import contextlib
import math
from argparse import Namespace
from typing import Any

import torch

from inr_kernels._core import dispatch
from inr_kernels.models import DEAR, IN2, FeatureRefiner, Inpainter, LaMa, from_checkpoint

from . import pictures
from .parsing import UsageError

NETWORKS: dict[str, type[Inpainter]] = {"dear": DEAR, "in2": IN2}
TILE = 32  # DEAR's default


def run(args: Namespace) -> None:
    """Reads the image and its mask, fills and renders in bands of rows, and writes the result."""
    pictures.prepare(args, input=args.input, mask=args.mask)
    source, drawn = pictures.read("input", args.input, args), pictures.read("mask", args.mask, args)
    if drawn.size != source.size:
        expected, found = pictures.shown(source.size), pictures.shown(drawn.size)
        raise ValueError(f"{drawn.label}: must have the input's size {expected}; got {found}")
    size = pictures.output_size(source, args)
    model = load(args.model)
    options = check_options(args, model, source, size)
    refiner = FeatureRefiner(model, workspace=args.workspace) if args.refine else None
    needs = model.bytes_per_pixel(**options), model.bytes_per_output_pixel
    needs = needs if refiner is None else (refiner.bytes_per_pixel(), 0)
    need = pictures.check_work(source, size, args, *needs)
    if refiner is not None and refiner.scales(*size) == 1:
        side = math.ceil(math.sqrt(2) * refiner.min_side)
        pictures.say(source.name, f"too small to refine, which needs sides of about {side}: filled without")
    picture = source.decode()
    pictures.check_transparency(picture, args)
    mask = read_mask(drawn)
    backend = dispatch.backend(args.backend) if args.backend else contextlib.nullcontext()
    with backend, pictures.computing(args) as progress:
        model.to(args.device)
        image, mask = pictures.network_input(picture).to(args.device), mask.to(args.device)
        if refiner is not None:
            # What the workspace, the images and the files leave for the network.
            other = need - math.prod(size) * model.bytes_per_refined_pixel()
            refiner.max_memory = math.floor(args.max_memory - other)
            colour = refiner(image, mask, progress=progress)
        else:
            colour = model.inpaint(image, mask, size, workspace=args.workspace, progress=progress, **options)
    pictures.write(args, picture, colour)


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


def check_options(args: Namespace, model: Inpainter, source: pictures.Source, size: tuple[int, int]) -> dict[str, Any]:
    """Checks what depends on the network; returns the options of its `inpaint` that only it has."""
    if min(source.size) < model.min_side:
        had = pictures.shown(source.size)
        raise ValueError(f"{source.label}: {model.NETWORK} needs sides of at least {model.min_side} pixels; got {had}")
    if isinstance(model, LaMa) and size != source.size:
        own = pictures.shown(source.size)
        raise UsageError(f"{model.NETWORK} fills at the input's size {own} only; got {pictures.requested(args)}")
    if args.refine and size != source.size:
        own = pictures.shown(source.size)
        raise UsageError(f"argument --refine: works at the input's size {own} only; got {pictures.requested(args)}")
    if args.refine and args.tile is not None:
        raise UsageError(f"argument --tile: does not apply with --refine; got {args.tile}")
    if isinstance(model, DEAR):
        return {"tile": (TILE if args.tile is None else args.tile) or None}
    if args.tile is not None:
        raise UsageError(f"argument --tile: applies to DEAR only, not to {model.NETWORK}; got {args.tile}")
    return {}


def read_mask(source: pictures.Source) -> torch.Tensor:
    """Decodes the mask, brightness times opacity, as [1, 1, h, w], float32, of zeros and ones."""
    drawn = source.decode()
    mask = drawn.colour.mean(1, keepdim=True)
    if drawn.alpha is not None:  # strokes on a transparent layer
        mask = mask * drawn.alpha
    holes = (mask >= 0.5).float()
    top = 2**drawn.depth - 1
    smallest, largest = (f"{value * top:.0f} of {top}" for value in (mask.min(), mask.max()))
    if not holes.any():
        pictures.say(source.name, f"the mask has no hole: its largest value is {largest}")
    elif holes.all():
        pictures.say(source.name, f"the mask covers the whole image: its smallest value is {smallest}")
    return holes
