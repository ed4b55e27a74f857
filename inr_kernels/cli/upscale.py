"""Render a picture at a larger size, by any factor.

  inr-kernels upscale in.png --scale 3.7 -o out.png

Reads what Pillow reads, writes PNG, JPEG, WebP, TIFF or BMP by the suffix of the output. Greyscale,
transparency (bicubic), 16 bits (PNG; TIFF without colour) and colour profiles are kept; pictures are
turned upright by their EXIF orientation.
"""

from pathlib import Path

from tqdm import tqdm

from inr_kernels.models import LIIF

from . import pictures


def add_arguments(parser):
    """The arguments of `inr-kernels upscale`."""
    parser.add_argument("input", type=Path, help="a picture")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a picture to write")
    pictures.add_size(parser, required=True)
    parser.add_argument("--model", type=Path, help="a checkpoint (.safetensors, LIIF's .pth)")
    pictures.add_machine(parser, megapixels=100)


def run(args):
    """Reads, renders in bands, writes."""
    pictures.prepare(args, args.input)
    picture = pictures.read(args.input, args)
    model = LIIF.from_checkpoint(args.model) if args.model else LIIF.pretrained()
    size = pictures.output_size(picture, args)
    pictures.check_output(picture, size, args.output, args.workspace, 4 * (model.config.features + 6))
    with tqdm(total=size[0], unit="row", disable=args.quiet) as bar:
        colour = model.to(args.device).upscale(
            picture.colour.expand(-1, 3, -1, -1),
            size=size,
            workspace=args.workspace,
            backend=args.backend,
            progress=lambda done, rows: bar.update(done - bar.n),
        )
    pictures.write(args.output, picture, colour)
