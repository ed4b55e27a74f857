"""The command `inr-kernels inpaint`."""

import contextlib
import math
from argparse import Namespace
from typing import Any

import torch

from inr_kernels._core import dispatch
from inr_kernels.models import DEAR, FeatureRefiner, Inpainter
from inr_kernels.models.data.masks import opacity

from . import pictures
from .networks import open_network
from .parsing import UsageError

TILE = 32  # DEAR's default
MAX_GREY = 1 / 3  # share of grey pixels that the soft edges of strokes hardly reach


def run(args: Namespace) -> None:
    """Reads the image and its mask, fills and renders in bands of rows, and writes the result."""
    pictures.prepare_computation(args)
    source, drawn = pictures.read("input", args.input, args), pictures.read("mask", args.mask, args)
    if drawn.size != source.size:
        expected, found = pictures.shown(source.size), pictures.shown(drawn.size)
        raise ValueError(f"{drawn.label}: must have the input's size {expected}; got {found}")
    size = pictures.output_size(source, args)
    model = open_network(args.model, Inpainter)
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


def check_options(args: Namespace, model: Inpainter, source: pictures.Source, size: tuple[int, int]) -> dict[str, Any]:
    """Checks what depends on the network; returns the options of its `inpaint` that only it has."""
    if min(source.size) < model.min_side:
        had = pictures.shown(source.size)
        raise ValueError(f"{source.label}: {model.NETWORK} needs sides of at least {model.min_side} pixels; got {had}")
    if not model.any_size and size != source.size:
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
    mask = opacity(drawn)
    holes = (mask >= 0.5).float()
    top = 2**drawn.depth - 1
    smallest, largest = (f"{value * top:.0f} of {top}" for value in (mask.min(), mask.max()))
    grey = ((mask > 0.1) & (mask < 0.9)).float().mean().item()
    rule = f"pixels are filled from {top // 2 + 1} on"
    if not holes.any():
        times = " (brightness times opacity)" if drawn.colour.shape[1] > 1 or drawn.alpha is not None else ""
        pictures.say(source.name, f"the mask has no hole: its largest value is {largest}{times}; {rule}")
    elif holes.all():
        pictures.say(source.name, f"the mask covers the whole image: its smallest value is {smallest}")
    elif grey > MAX_GREY:
        pictures.say(source.name, f"{100 * grey:.0f} % of the mask is grey, as of a photograph; {rule}")
    return holes
