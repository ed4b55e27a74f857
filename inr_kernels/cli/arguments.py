"""The command lines of all commands, and their help. Imports nothing heavy: `--help` is shown at once."""

import argparse
from importlib.metadata import version

from .descriptions import APP, DEMO, DESCRIPTION, EVALUATE, EXPORT, INFO, INPAINT, PROVE, TRAIN, UPSCALE
from .parsing import Parser, device, gigabytes, megabytes, model, name_suffix, positive, scales, size

# Of the commands; tests compare these with what the modules that import torch define.
FORMATS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff")
MAX_THREADS = 1024  # torch crashes with some ten thousand
BACKENDS = ("cpu", "cuda", "triton", "reference")
OPERATORS = (
    *(
        "conv2d",
        "conv3x3",
        "elementwise_filter",
        "fourier_unit",
        "local_implicit",
        "local_texture",
        "mlp",
        "neighborhood_attention",
    ),
    "unmask_attention",
)
DTYPES = ("float32", "tf32", "bfloat16", "float16", "float64")
NETWORKS = {"upscale": ("liif",), "inpaint": ("dear", "in2")}
NETWORKS["export"] = NETWORKS["evaluate"] = ("liif", "dear", "in2")
NETWORKS["app"] = ("dear", "in2", "liif")
CONVENTIONS = ("plain", "liif", "liif-div2k", "lama", "coordfill", "dear", "in2")
FITS = ("origin", "modulo", "resize", "pad-constant", "pad-edge")
PRESETS = ("in2", "dear")
MASKS = ("thin", "medium", "thick", "mixed", "box", "strokes", "noise")
CROP_MARGIN, CROP_TRIGGER_SIZE = 128, 800  # pixels


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
    _add_app(add("app", APP))
    _add_evaluate(add("evaluate", EVALUATE))
    _add_export(add("export", EXPORT))
    _add_train(add("train", TRAIN))
    add("info", INFO)
    _add_prove(add("prove", PROVE))
    _add_demo(add("demo", DEMO))
    return parser


def _add_upscale(parser):
    _add_inputs(parser)
    _add_output(parser)
    _add_size(parser, required=True)
    _add_model(
        parser,
        "upscale",
        "liif, or a checkpoint of LIIF or LTE (.safetensors, yinboc/liif's, mmagic's or jaewon-lee-b/lte's .pth)",
    )
    _add_computation(parser, megapixels=100)


def _add_inpaint(parser):
    _add_inputs(parser)
    parser.add_argument(
        "--mask",
        required=True,
        help="an image of the same size; white: fill; -: the standard input, if the image is not; for a folder: one"
        " mask for all, or a folder or pattern of masks with the images' names",
    )
    _add_output(parser)
    _add_size(parser, required=False)
    _add_model(parser, "inpaint", "dear, in2 or a checkpoint")
    parser.add_argument(
        "--tile",
        type=positive(int, or_zero=True),
        metavar="PIXELS",
        help="DEAR only: encode in tiles of this side, in time proportional to the pixels, with another result;"
        " 0: the whole image at once, the default",
    )
    parser.add_argument(
        "--refine",
        action="store_true",
        help="refine the network's features, for holes larger than those of its training",
    )
    group = parser.add_argument_group("large pictures with small holes, as in IOPaint")
    group.add_argument(
        "--hd-strategy",
        type=str.lower,
        choices=["original", "crop"],
        default="original",
        help="original: the network sees the whole image; crop: only the surroundings of the holes, which takes less"
        " time and memory; default: %(default)s",
    )
    group.add_argument(
        "--hd-strategy-crop-margin",
        type=positive(int),
        metavar="PIXELS",
        help=f"width of the surroundings; default: {CROP_MARGIN}",
    )
    group.add_argument(
        "--hd-strategy-crop-trigger-size",
        type=positive(int, or_zero=True),
        metavar="PIXELS",
        help=f"crop images whose longer side is larger; default: {CROP_TRIGGER_SIZE}",
    )
    _add_computation(parser, megapixels=25)


def _add_app(parser):
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        type=model("app", NETWORKS),
        help="offer this network first: dear, in2, liif or a checkpoint; may be given several times",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="the address to listen on; default: %(default)s, this machine alone; 0.0.0.0: also from other machines",
    )
    parser.add_argument(
        "--port",
        type=positive(int, or_zero=True, most=65535),
        default=7860,
        metavar="N",
        help="the port to listen on; 0: a free one; default: %(default)s",
    )
    parser.add_argument(
        "--max-upload",
        type=megabytes,
        default="100",
        metavar="MB",
        help="refuse larger files; default: 100",
    )
    _add_computation(parser, megapixels=25, bar=False)


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


def _add_inputs(parser):
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="input",
        help="an image, a folder, a pattern such as 'photos/*.jpg', or several of them; -: the standard input",
    )


def _add_output(parser):
    parser.add_argument(
        "-o", "--output", required=True, help="the image to write, or a folder for images; -: the standard output"
    )
    parser.add_argument(
        "--format",
        type=str.lower,
        choices=FORMATS,
        help="format of the output; default: as its suffix says, PNG for the standard output, pipes and devices; in a"
        " folder that of each input, or PNG",
    )
    group = parser.add_argument_group("folders")
    group.add_argument(
        "--suffix", type=name_suffix, default="", metavar="TEXT", help="add this to the outputs' names, e.g. _large"
    )
    group.add_argument("--recursive", action="store_true", help="search subfolders, too, and keep them in the output")
    group.add_argument("--overwrite", action="store_true", help="recompute outputs that exist; default: skip them")
    group.add_argument(
        "--batch-size",
        type=positive(int),
        default=1,
        metavar="N",
        help="compute up to N images of one size together, meant for GPUs; default: %(default)s",
    )


def _add_size(parser, required):
    """Adds --scale and --size, of which only one may be given."""
    target = parser.add_mutually_exclusive_group(required=required)
    target.add_argument(
        "--scale", type=positive(float, least=1), metavar="FACTOR", help="how many times larger, e.g. 2 or 3.7"
    )
    target.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="width and height of the output in pixels, e.g. 1920x1080; another aspect ratio stretches the image",
    )


def _add_model(parser, command, text):
    names = NETWORKS[command]
    parser.add_argument("--model", type=model(command, NETWORKS), default=names[0], help=f"{text}; default: {names[0]}")


def _add_computation(parser, megapixels, limits=True, bar=True):
    """Adds the options that say how to compute, and within which limits.

    megapixels: the default limit of the input. limits: also those of memory. bar: whether there is a progress bar.
    """
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        help="implementation to compute with; default: see `inr-kernels info`",
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
    if bar:
        group.add_argument(
            "--quiet", action="store_true", default=None, help="show no progress bar"
        )  # None: on terminals


def _add_prove(parser):
    parser.add_argument("--op", nargs="+", choices=OPERATORS, metavar="NAME", help="only these operators; default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="NAME", help="only these; default: all")
    parser.add_argument(
        "--device", type=device, metavar="N|cpu", help="a GPU's number, or cpu; default: one GPU of each model"
    )
    parser.add_argument("--quick", action="store_true", help="only each operator's most used form, measured less long")
    parser.add_argument("--missing", action="store_true", help="only what has no verdict yet")
    parser.add_argument("--quiet", action="store_true", default=None, help="show no progress bar")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--list", action="store_true", help="show the verdicts that are stored, of all devices, and stop"
    )
    action.add_argument("--forget", action="store_true", help="delete verdicts, and stop")


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
        default=2,
        metavar="N",
        help="number of measurements, of which the median is shown; default: %(default)s",
    )
