"""The command `inr-kernels evaluate`."""

import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from inr_kernels._core.files import replace_file
from inr_kernels._core.text import printable
from inr_kernels.models import Network
from inr_kernels.models.data import masks
from inr_kernels.models.evaluation import report
from inr_kernels.models.evaluation.baselines import Method
from inr_kernels.models.evaluation.metrics import CONVENTIONS, Convention
from inr_kernels.models.evaluation.perceptual import LPIPS, Inception
from inr_kernels.models.evaluation.run import Options, evaluate, method_of
from inr_kernels.models.evaluation.samples import PRESETS, Case, pair
from inr_kernels.models.liif.upscaler import Upscaler

from .networks import open_network
from .parsing import UsageError
from .pictures import prepare_computation

DEFAULT_MASKS = "strokes"  # of presets


def run(args: Namespace) -> None:
    """Checks the options, compares all pictures, prints the tables and writes them, the values and a plot."""
    folder, kind = check_options(args)
    convention = CONVENTIONS[args.convention or args.preset or "plain"]
    check_packages(args, convention)
    prepare_computation(args)
    options = Options(
        cases=cases(args),
        convention=convention,
        fit=args.fit,
        fit_side=args.fit_side,
        seed=args.seed,
        without=None if args.no_baselines else missing_baselines(uses_masks=bool(folder or kind)),
        lpips=LPIPS(args.lpips).to(args.device) if args.lpips else None,
        inception=Inception(args.fid).to(args.device) if args.fid else None,
        max_pixels=args.max_megapixels * 1e6,
        device=args.device,
    )
    if options.lpips is not None and options.lpips.net != convention.lpips:
        say(f"{args.lpips}: LPIPS of {options.lpips.net}, but this convention's tables have that of {convention.lpips}")
    methods = networks(args, uses_masks=bool(folder or kind))
    if args.output:
        os.makedirs(args.output, exist_ok=True)
    items = pair(args.data, folder, kind, labelled(args.pred, "folder"), say)
    with tqdm(total=len(items) * len(options.cases), unit="picture", disable=args.quiet) as bar:

        def complain(message: str) -> None:
            with tqdm.external_write_mode(file=sys.stderr):
                say(message)

        results = evaluate(items, methods, options, complain, bar.update)
    if not results.rows:
        raise ValueError(f"{args.data}: no picture could be compared")
    about = [f"Convention: {convention.about}."]
    if folder or kind:
        about.append(f"Masks: {folder or f'{kind}, drawn with seed {args.seed}'}.")
    text = report.document(results, about, args.bins)
    print(text, end="")
    if args.output:
        lines = [*report.overall(results), *report.by_area(results, args.bins)]
        texts = {"table.md": text, "table.csv": report.table_csv(lines), "pictures.csv": report.pictures_csv(results)}
        files = {name: content.encode() for name, content in texts.items()}
        files["plot.png"] = report.plot(results, args.bins)
        for name, data in files.items():
            replace_file(Path(args.output) / name, data)


def say(message: str) -> None:
    """Prints one line on stderr, if it is open."""
    if sys.stderr is not None:
        print(f"inr-kernels: {printable(message)}", file=sys.stderr)


def check_options(args: Namespace) -> tuple[str | None, str | None]:
    """Checks which options go together; returns the folder of masks, or the kind of masks that are drawn."""
    folder = args.masks if args.masks and os.path.isdir(args.masks) else None
    kind = None if folder else args.masks
    if args.preset and not (folder or kind):
        kind = DEFAULT_MASKS
    if kind:
        try:
            masks.parse(kind)
        except ValueError as error:
            raise UsageError(f"argument --masks: must be a folder or the kind of masks to draw; {error}") from None
    if args.pred and kind:
        raise UsageError(f"argument --masks: must be a folder with --pred, which was filled before; got {kind}")
    if args.pred and (args.preset or len(args.scales) > 1):
        raise UsageError("argument --pred: takes one of --scales at most, and no --preset")
    if not (args.pred or folder or kind or args.scales):
        raise UsageError("nothing to compare: give --masks to fill holes, --scales to enlarge, or --pred")
    if args.model and not (folder or kind or args.scales):
        raise UsageError("argument --model: give --masks to fill holes, or --scales to enlarge")
    return folder, kind


def check_packages(args: Namespace, convention: Convention) -> None:
    """Raises ImportError, before any work, if a package is missing."""
    of_convention = ["skimage"] if convention.window == "uniform" else []
    for name in ("torchmetrics", *of_convention, *(["matplotlib"] if args.output else [])):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"evaluate needs {name}: pip install 'inr-kernels[evaluate]'")


def cases(args: Namespace) -> Sequence[Case]:
    """The settings of the table: of a preset, one for each scale, or the pictures as they are."""
    if args.preset:
        return PRESETS[args.preset]
    return [Case.of_scale(scale) for scale in args.scales] or [Case()]


def missing_baselines(uses_masks: bool) -> tuple[str, ...]:
    """The baselines that cannot run here; says so."""
    if not uses_masks or importlib.util.find_spec("cv2") is not None:
        return ()
    say("without Telea's method, which needs OpenCV: pip install opencv-python-headless")
    return ("Telea",)


def labelled(names: Sequence[str], kind: str) -> dict[str, str]:
    """Names of files or folders by what the table calls them: the last part, or all where that is not unique."""
    short = [Path(name).resolve().name if kind == "folder" else Path(name).stem for name in names]
    return {label if short.count(label) == 1 else name: name for label, name in zip(short, names, strict=True)}


def networks(args: Namespace, uses_masks: bool) -> dict[str, Method]:
    """Opens the networks; they are named as on the command line."""
    methods = {}
    for label, name in labelled(args.model, "file").items():
        model = open_network(name, Network)
        if uses_masks and isinstance(model, Upscaler):
            raise UsageError(f"argument --model: {name} enlarges and does not fill holes; leave --masks out")
        methods[label] = method_of(model, args.device)
    return methods
