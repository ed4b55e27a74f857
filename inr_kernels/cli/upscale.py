"""Render an image at a larger size, by any factor.

  inr-kernels upscale in.png --scale 3.7 -o out.png

Reads PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000, PPM, TGA and ICO (and HEIC with pillow-heif); writes PNG, JPEG,
WebP, TIFF or BMP, as the suffix of the output says. Greyscale, transparency (upscaled bicubically), 16 bits (in PNG,
and in TIFF without colour), colour profiles, resolution, EXIF, XMP and text are kept where the format can hold them;
a line on stderr names what it cannot. Images are rotated as their EXIF orientation says.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from tqdm import tqdm

from inr_kernels.models import LIIF

from . import pictures


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of `inr-kernels upscale`."""
    parser.add_argument("input", type=Path, help="an image")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the image to write")
    pictures.add_size(parser, required=True)
    parser.add_argument("--model", type=Path, help="a LIIF checkpoint (.safetensors, yinboc/liif's or mmagic's .pth)")
    pictures.add_machine(parser, megapixels=100)


def run(args: Namespace) -> None:
    """Reads the image, renders it in bands of rows, and writes the result."""
    pictures.prepare(args, args.input)
    picture = pictures.read(args.input, args)
    model = LIIF.from_checkpoint(args.model) if args.model else LIIF.pretrained()
    size = pictures.output_size(picture, args)
    pictures.check_output(picture, size, args.output, args.workspace, 4 * (model.config.features + 6))
    with tqdm(total=size[0], unit="row", disable=args.quiet) as bar:
        colour = model.to(args.device).upscale(
            pictures.network_input(picture),
            size=size,
            workspace=args.workspace,
            backend=args.backend,
            progress=lambda done, rows: bar.update(done - bar.n),
        )
    pictures.write(args.output, picture, colour)
