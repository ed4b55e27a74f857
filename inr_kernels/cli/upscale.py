"""The command `inr-kernels upscale`."""

from argparse import Namespace

from inr_kernels.models import LIIF

from . import pictures
from .networks import open_network


def run(args: Namespace) -> None:
    """Reads the image, renders it in bands of rows, and writes the result."""
    pictures.prepare_computation(args)
    source = pictures.read("input", args.input, args)
    size = pictures.output_size(source, args)
    model = open_network(args.model, LIIF)
    pictures.check_work(source, size, args, 4 * (model.config.features + 6))
    picture = source.decode()
    pictures.check_transparency(picture, args)
    with pictures.computing(args) as progress:
        colour = model.to(args.device).upscale(
            pictures.network_input(picture).to(args.device),
            size=size,
            workspace=args.workspace,
            backend=args.backend,
            progress=progress,
        )
    pictures.write(args, picture, colour)
