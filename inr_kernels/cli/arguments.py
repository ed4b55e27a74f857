"""The command lines of all commands, and their help. Imports nothing heavy: `--help` is shown at once."""

import argparse
from importlib.metadata import version

from .parsing import Parser, gigabytes, megabytes, model, positive, scales, size

# Of the commands; tests compare these with what the modules that import torch define.
FORMATS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff")
MAX_THREADS = 1024  # torch crashes with some ten thousand
BACKENDS = ("cpu", "cuda", "triton", "reference")
NETWORKS = {"upscale": ("liif",), "inpaint": ("dear", "in2")}
NETWORKS["export"] = NETWORKS["evaluate"] = ("liif", "dear", "in2")
CONVENTIONS = ("plain", "liif", "liif-div2k", "lama", "coordfill", "dear", "in2")
FITS = ("origin", "modulo", "resize", "pad-constant", "pad-edge")
PRESETS = ("in2", "dear")

DESCRIPTION = (
    "Enlarge pictures, fill their holes, measure quality, train and export networks, show what this machine runs, or"
    " compare speed and quality in a demo."
)

UPSCALE = """\
Render an image at a larger size, by any factor.

  inr-kernels upscale in.png --scale 3.7 -o out.png
  inr-kernels upscale in.png --size 1920x1080 -o out.png

Reads PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000, PPM, TGA and ICO (and HEIC with pillow-heif); writes PNG, JPEG,
WebP, TIFF or BMP, as the suffix of the output or --format says. Greyscale, transparency (upscaled bicubically), 16 bits
(in PNG, and in TIFF without colour), colour profiles, resolution, EXIF, XMP and text are kept where the format can hold
them; a line on stderr names what it cannot. Images are rotated as their EXIF orientation says.

The name "-" is the standard input or output. Pipes and devices are read once, and written in place."""

INPAINT = """\
Fill the missing pixels of an image, optionally at a larger size.

  inr-kernels inpaint in.png --mask mask.png -o out.png
  inr-kernels inpaint in.png --mask mask.png --scale 2.5 -o large.png
  inr-kernels inpaint in.png --mask mask.png --model big-lama.pt --refine -o out.png

The mask is an image of the same size: white pixels are filled, black ones are kept; grey counts as white from 128 (of
255) on. At the input's size the kept pixels do not change (in PNG, BMP and, except for 16-bit colour, TIFF).
Strokes on a transparent layer work, too: the mask is brightness times opacity.
Formats, greyscale, transparency, 16 bits, colour profiles, the name "-" and pipes: as in `inr-kernels upscale`.

Networks, --model:

  dear    the better of the two that ship, and the one for larger sizes. It encodes the image in tiles with their
          surroundings; with --tile 0 every known pixel attends to every pixel, as in the paper: twice the pixels take
          four times as long, and the progress bar does not move meanwhile.
  in2     several times faster: it sees the whole image at once, in time proportional to the number of pixels.
          Sides of at least 9 pixels. It fills at the input's size only.
  PATH    a checkpoint of DEAR, IN2, ImplicitAutoencoder or LaMa: a .safetensors file of this package, or a file of
          LaMa as others publish it, such as big-lama.pt or a .ckpt. The last two fill at the input's size only.

With --refine, large holes in large images get the structure that the network finds at a small size. It takes about 30
times as long, at the input's size only, and is meant for LaMa.

Both networks that ship are small and were trained on a few photographs, in2 so briefly that its fills stay visible:
use them for scratches and strokes, not for whole objects."""

EXPORT = """\
Write a network as an ONNX file, for ONNX Runtime and others.

  inr-kernels export --model big-lama.pt -o lama.onnx

Images are [1, 3, height, width], float32, in [0, 1]. Networks that fill holes take image and mask [1, 1, height,
width], 1 = fill; LIIF takes image and size, two int64: the output's height and width. Height and width stay open,
unless --size fixes them. The file has standard operators only (opset 20). This takes up to some minutes, and needs
pip install 'inr-kernels[onnx]'."""

EVALUATE = """\
Measure the quality of networks, or of another program's pictures, on folders of pictures.

  inr-kernels evaluate --model dear --model in2 --data DIR --masks strokes -o OUT
  inr-kernels evaluate --model liif --data DIR --scales 2,3.7,8
  inr-kernels evaluate --pred FILLED --target DIR --masks MASKS --convention lama
  inr-kernels evaluate --model my.safetensors --data DIR --preset in2

Prints a table with PSNR (also of the missing pixels alone), SSIM and L1 of each method and of baselines: mean colour,
smooth fill, Telea's method (with OpenCV), bicubic and nearest-neighbour interpolation. With -o it also writes table.md,
table.csv, the values of each picture in pictures.csv, and plot.png. Folders are searched with their subfolders.
Pictures, masks and predictions belong together if they have one name; a mask or prediction may add _mask000 to it.
What is missing or damaged is named on stderr, and the rest goes on.

Kinds of masks, --masks: thin, medium, thick: LaMa's test masks; mixed, box: of its training; strokes: over 20 to 30 %
of the picture ("strokes:15" over 15 %, "strokes:5-40" over 5 to 40 %); noise: single pixels, 10 to 90 % of them.

Conventions, --convention, of published tables:

  plain        RGB in 8 bits, as a file holds it
  liif         LIIF's benchmarks: luminance, without a border of the scale
  liif-div2k   RGB, without a border of scale + 6 pixels
  lama         8 bits by truncation, SSIM with zero padding, LPIPS of VGG-16, input padded to multiples of 8
  coordfill    8 bits by truncation, SSIM of scikit-image with a window of 11 pixels, LPIPS of AlexNet
  dear, in2    of these papers, as far as they say; in2 follows coordfill

Presets, --preset: in2: the middle of each picture at IN²'s eight sizes (named height × width, as in the paper); dear:
pictures shrunk by DEAR's eight scales. Both draw strokes unless --masks is given, and set the convention.
Needs pip install 'inr-kernels[evaluate]'."""

TRAIN = """\
Train a network on folders of pictures, by a shipped config or an own one.

  inr-kernels train in2_small data=PHOTOS out=RUN steps=20
  inr-kernels train in2_small data=PHOTOS out=RUN steps=20 --resume
  inr-kernels train in2_small --print-config

CONFIG is the name of a shipped config or a YAML file: in2_small, dear_small, liif_small, lte_small, lama_small and
autoencoder for one core, in2_paper, dear_paper and liif_paper as the papers have it. --print-config shows every option,
its value and what it means; key=value changes one, and loss.perceptual=0 one in a group.

Everything is written in the folder `out`: model.safetensors, the result; config.yaml; tensorboard/ with losses and
pictures; checkpoints/, from which --resume continues with the same numbers. Needs pip install
'inr-kernels[train]'."""

INFO = """\
Show this machine, the installed versions, and which implementation of each operator runs here.

Each operator's implementations are listed in the order in which they are tried, with the reason if one does not run.
"<-" marks the one that is used, which the environment variable INR_KERNELS_BACKEND can change."""

DEMO = """\
Shrink a photograph, enlarge it again with plain PyTorch and with the fused kernels, and compare.

Prints time, memory and PSNR (how close an output is to the original; higher is better), and writes one picture that
shows all outputs side by side. The shipped model was not trained on this photograph."""


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all command lines; the parsed `command` is None if the command line is empty."""
    parser = Parser(
        prog="inr-kernels",
        description=DESCRIPTION,
        epilog="`inr-kernels COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"inr-kernels {version('inr-kernels')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=text.split("\n")[0], description=text, formatter_class=raw)

    _add_upscale(add("upscale", UPSCALE))
    _add_inpaint(add("inpaint", INPAINT))
    _add_evaluate(add("evaluate", EVALUATE))
    _add_export(add("export", EXPORT))
    _add_train(add("train", TRAIN))
    add("info", INFO)
    _add_demo(add("demo", DEMO))
    return parser


def _add_upscale(parser):
    parser.add_argument("input", help="an image; -: the standard input")
    _add_output(parser)
    _add_size(parser, required=True)
    _add_model(
        parser,
        "upscale",
        "liif, or a checkpoint of LIIF or LTE (.safetensors, yinboc/liif's, mmagic's or jaewon-lee-b/lte's .pth)",
    )
    _add_computation(parser, megapixels=100)


def _add_inpaint(parser):
    parser.add_argument("input", help="an image; -: the standard input")
    parser.add_argument(
        "--mask",
        required=True,
        help="an image of the same size; white: fill; -: the standard input, if the image is not",
    )
    _add_output(parser)
    _add_size(parser, required=False)
    _add_model(parser, "inpaint", "dear, in2 or a checkpoint")
    parser.add_argument(
        "--tile",
        type=positive(int, or_zero=True),
        metavar="PIXELS",
        help="DEAR only: side of a tile, 0: whole image; default: 32",
    )
    parser.add_argument(
        "--refine",
        action="store_true",
        help="refine the network's features, for holes larger than those of its training",
    )
    _add_computation(parser, megapixels=25)


def _add_export(parser):
    _add_model(parser, "export", "liif, dear, in2 or a checkpoint, also LaMa's")
    parser.add_argument("-o", "--output", required=True, help="the file to write")
    parser.add_argument("--size", type=size, metavar="WxH", help="the only width and height; default: any")


def _add_evaluate(parser):
    names = ", ".join(NETWORKS["evaluate"])
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        type=model("evaluate", NETWORKS),
        help=f"a network: {names} or a checkpoint; may be given several times",
    )
    parser.add_argument("--data", "--target", required=True, metavar="DIR", help="the folder of original pictures")
    parser.add_argument(
        "--pred",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of another program's outputs; may be given several times",
    )
    parser.add_argument("--masks", metavar="DIR|KIND", help="a folder of masks (white: missing), or a kind to draw")
    setting = parser.add_mutually_exclusive_group()
    setting.add_argument(
        "--scales",
        type=scales,
        default=[],
        metavar="N,N",
        help="shrink the pictures by these factors, and enlarge them again",
    )
    setting.add_argument("--preset", choices=PRESETS, help="the settings of a paper's tables")
    parser.add_argument(
        "--convention", choices=CONVENTIONS, help="how pictures are compared; default: the preset's, else plain"
    )
    parser.add_argument("--lpips", metavar="PATH", help="also LPIPS: weights of torchvision's alexnet or vgg16")
    parser.add_argument("--fid", metavar="PATH", help="also FID: pytorch-fid's weights of Inception")
    parser.add_argument(
        "--fit",
        choices=FITS,
        help="how images reach a network: as they are, mirrored to multiples of 8, resized to a square, or padded to"
        " one; default: the convention's",
    )
    parser.add_argument(
        "--fit-side",
        type=positive(int),
        default=512,
        metavar="PIXELS",
        help="side of that square; default: %(default)s",
    )
    parser.add_argument(
        "--bins", type=positive(int), default=10, metavar="N", help="ranges of masks' areas; default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=positive(int, or_zero=True), default=0, metavar="N", help="of drawn masks; default: %(default)s"
    )
    parser.add_argument("--no-baselines", action="store_true", help="only the networks and predictions")
    parser.add_argument("-o", "--output", metavar="DIR", help="a folder for the tables and the plot")
    _add_computation(parser, megapixels=25, limits=False)


def _add_train(parser):
    parser.add_argument("config", metavar="CONFIG", help="a shipped config, or a YAML file")
    parser.add_argument("options", nargs="*", metavar="key=value", help="an option of the config and its value")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder `out`")
    parser.add_argument("--print-config", action="store_true", help="show all options with their help, and stop")


def _add_output(parser):
    parser.add_argument("-o", "--output", required=True, help="the image to write; -: the standard output")
    parser.add_argument(
        "--format",
        type=str.lower,
        choices=FORMATS,
        help="format of the output; default: as its suffix says, PNG for the standard output, pipes and devices",
    )


def _add_size(parser, required):
    """Adds --scale and --size, of which only one may be given."""
    target = parser.add_mutually_exclusive_group(required=required)
    target.add_argument("--scale", type=positive(float), metavar="FACTOR", help="how many times larger, e.g. 2 or 3.7")
    target.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="width and height of the output in pixels, e.g. 1920x1080; another aspect ratio stretches the image",
    )


def _add_model(parser, command, text):
    names = NETWORKS[command]
    parser.add_argument("--model", type=model(command, NETWORKS), default=names[0], help=f"{text}; default: {names[0]}")


def _add_computation(parser, megapixels, limits=True):
    """Adds the options that say how to compute, and within which limits.

    megapixels: the default limit of the input. limits: also those of memory.
    """
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        help="implementation to compute with; default: the first that can run here (see `inr-kernels info`)",
    )
    group.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute; default: cpu")
    if limits:
        group.add_argument(
            "--workspace",
            type=megabytes,
            default="256",
            metavar="MB",
            help="working memory in megabytes, in addition to the pictures and the network's features; default: 256",
        )
        group.add_argument(
            "--max-memory",
            type=gigabytes,
            default="16",
            metavar="GB",
            help="refuse work that needs more memory, all together; default: 16",
        )
    group.add_argument(
        "--threads", type=positive(int, most=MAX_THREADS), metavar="N", help="CPU threads; default: PyTorch's choice"
    )
    group.add_argument(
        "--max-megapixels",
        type=positive(float),
        default=megapixels,
        metavar="N",
        help="refuse larger inputs; default: %(default)s",
    )
    group.add_argument("--quiet", action="store_true", default=None, help="show no progress bar")  # None: on terminals


def _add_demo(parser):
    parser.add_argument(
        *("-o", "--output"), default="demo.png", metavar="FILE", help="the picture to write; default: %(default)s"
    )
    parser.add_argument(
        "--scale",
        type=positive(float),
        default=3.7,
        metavar="FACTOR",
        help="how much to shrink and enlarge; default: %(default)s",
    )
    parser.add_argument(
        "--repeat",
        type=positive(int),
        default=3,
        metavar="N",
        help="number of measurements, of which the median is shown; default: %(default)s",
    )
