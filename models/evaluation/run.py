"""Compares networks, or pictures that another program wrote, with baselines."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image

from inr_kernels._core.checks import require

from ..common.network import Inpainter, Network
from ..data.images import shrink, to_image, to_tensor
from ..data.masks import free_form_mask
from ..liif.upscaler import Upscaler
from .baselines import Method, baselines, mean_fill, telea
from .fitting import SIDE, fitted
from .metrics import CONVENTIONS, Convention, compare, levels, psnr
from .perceptual import LPIPS, Inception, frechet_distance
from .samples import Case, Item, Report, Sample, load, read


class Row(NamedTuple):
    """The metrics of one output. share: of missing pixels, NaN without a mask."""

    case: str
    method: str
    picture: str
    share: float
    values: dict[str, float]


@dataclass
class Options:
    """What `evaluate` does besides comparing.

    Attributes:
        cases: settings of the table.
        convention: how pictures are compared.
        fit: how an image reaches a network, see `fitting.FITS`; None: as the convention says.
        fit_side: of a square input, in pixels.
        seed: of masks that are drawn. A picture's mask depends on its name and size, not on the other pictures.
        without: baselines that are left out; None: all are.
        lpips, inception: networks of LPIPS and FID, or None.
        max_pixels: the largest picture.
        device: of the networks.
    """

    cases: Sequence[Case] = (Case(),)
    convention: Convention = CONVENTIONS["plain"]
    fit: str | None = None
    fit_side: int = SIDE
    seed: int = 0
    without: Sequence[str] | None = ()
    lpips: LPIPS | None = None
    inception: Inception | None = None
    max_pixels: float = 25e6
    device: str = "cpu"


@dataclass
class Results:
    """What `evaluate` returns. fid: Fréchet distances by (case, method), where an Inception network was given."""

    rows: list[Row] = field(default_factory=list)
    fid: dict[tuple[str, str], float] = field(default_factory=dict)


def method_of(model: Network, device: str = "cpu") -> Method:
    """Moves a network to the device, and returns what it makes of (image, mask, size).

    One that inpaints enlarges an image without mask, too.

    Raises:
        ValueError: by the method, for a network that upscales and an image with a mask.
    """
    if not isinstance(model, Upscaler | Inpainter):
        raise ValueError(f"model must upscale or inpaint; got {model.NETWORK}")
    model.to(device)

    def run(image: torch.Tensor, mask: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        image = image.to(device)
        if not isinstance(model, Inpainter):
            if mask is not None:
                raise ValueError(f"{model.NETWORK} does not fill holes")
            return model.upscale(image, size=size).cpu()
        mask = torch.zeros_like(image[:, :1]) if mask is None else mask.to(device)
        return model.inpaint(image, mask, None if size == image.shape[2:] else size).cpu()

    return run


@torch.no_grad()
def evaluate(
    items: Sequence[Item],
    methods: Mapping[str, Method],
    options: Options | None = None,
    report: Report = lambda message: None,
    progress: Callable[[], object] = lambda: None,
) -> Results:
    """Compares methods, predictions of other programs and baselines on pictures.

    A picture that cannot be read, or that a method does not take, is reported, and the rest goes on.

    Args:
        items: the pictures, as `pair` finds them.
        methods: by their names in the table, see `method_of`.
        options: cases, convention and more.
        report: called with a message that begins with the file or the picture, once for each.
        progress: called after each picture of a case.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    options = options or Options()
    fit = options.fit or options.convention.fit
    results, features, reported = Results(), _Features(options.inception), set()

    def complain(message: str) -> None:
        if message not in reported:  # in another case
            reported.add(message)
            report(message)

    for case in options.cases:
        for item in items:
            try:
                sample = load(item, case, options.seed, options.max_pixels)
            except (OSError, ValueError) as error:
                complain(_text(error))
            else:
                for label, output in _outputs(item, sample, methods, fit, options, complain):
                    try:
                        values = _compare(output, sample, case, options)
                    except (ValueError, RuntimeError) as error:  # LPIPS of a picture that is too small
                        complain(f"{item.name}, {label}: {error}")
                        continue
                    share = math.nan if sample.mask is None else sample.mask.mean().item()
                    results.rows.append(Row(case.name, label, item.name, share, values))
                    features.add(case.name, label, output, sample.target, options)
            progress()
    results.fid = features.distances()
    return results


def _outputs(
    item: Item,
    sample: Sample,
    methods: Mapping[str, Method],
    fit: str,
    options: Options,
    complain: Report,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every output for a sample by its name in the table."""
    size = (sample.target.shape[2], sample.target.shape[3])
    for label, path in item.predictions.items():
        try:
            yield label, to_tensor(read(path, options.max_pixels))
        except (OSError, ValueError) as error:
            complain(_text(error))
    larger = sample.image.shape != sample.target.shape
    classical = {} if options.without is None else baselines(sample.mask is not None, larger, options.without)
    fit = "origin" if larger else fit
    networks = {label: fitted(method, fit, options.fit_side) for label, method in methods.items()}
    for label, method in (networks | classical).items():
        try:
            yield label, method(sample.image, sample.mask, size)
        except (ValueError, RuntimeError) as error:  # also out of memory
            complain(f"{item.name}, {label}: {error}")


def _text(error: Exception) -> str:
    """The message of an error that has a file's name."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


def _compare(output: torch.Tensor, sample: Sample, case: Case, options: Options) -> dict[str, float]:
    found, expected = (f"{x.shape[3]}x{x.shape[2]}" for x in (output, sample.target))
    require(found == expected, "the output", f"have the target's size {expected}", found)
    mask = sample.mask
    if mask is not None and mask.shape[2:] != sample.target.shape[2:]:
        mask = torch.nn.functional.interpolate(mask, sample.target.shape[2:], mode="nearest-exact")
    values = compare(output, sample.target, mask, options.convention, case.scale)
    if options.lpips is not None:
        pair = (levels(x, options.convention.levels).to(options.device) for x in (output, sample.target))
        values["lpips"] = options.lpips(*pair).item()
    return values


class _Features:
    """Inception's features of all outputs, by (case, method), and of their originals."""

    def __init__(self, inception: Inception | None):
        self.inception = inception
        self.outputs: dict[tuple[str, str], list[torch.Tensor]] = {}
        self.targets: dict[tuple[str, str], list[torch.Tensor]] = {}
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, case: str, label: str, output: torch.Tensor, target: torch.Tensor, options: Options) -> None:
        if self.inception is None:
            return
        kind = options.convention.levels
        if self.last is None or self.last[0] is not target:  # one target has several outputs
            self.last = target, self.inception(levels(target, kind).to(options.device)).cpu()
        self.targets.setdefault((case, label), []).append(self.last[1])
        features = self.inception(levels(output, kind).to(options.device)).cpu()
        self.outputs.setdefault((case, label), []).append(features)

    def distances(self) -> dict[tuple[str, str], float]:
        return {
            key: frechet_distance(torch.cat(found), torch.cat(self.targets[key])) if len(found) > 1 else math.nan
            for key, found in self.outputs.items()
        }


def _output(model: Any, image: torch.Tensor, mask: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
    """What a network makes of an image on the CPU, wherever its parameters are."""
    image = image.to(next(model.parameters()).device)
    out = model.upscale(image, size=size) if mask is None else model.inpaint(image, mask.to(image.device), size)
    return out.cpu()


def compare_upscaling(model: Upscaler, photo: Image.Image, scale: float) -> tuple[float, float]:
    """Returns the PSNR of the network and of bicubic interpolation on a photograph that was shrunk by `scale`.

    A border of `scale` pixels does not count.
    """
    small, shown = shrink(photo, scale)
    ours = to_image(_output(model, to_tensor(small), None, shown.size[::-1]))
    border = math.ceil(scale)
    ours_db, bicubic_db = (psnr(p, shown, border) for p in (ours, small.resize(shown.size, Image.Resampling.BICUBIC)))
    return ours_db, bicubic_db


def compare_inpainting(model: Inpainter, photo: Image.Image) -> tuple[float, float, float]:
    """Returns the PSNR of the network, of the mean colour and of Telea's method on a photograph with a mask over 15 %
    of its pixels.
    """
    image = to_tensor(photo)
    mask = free_form_mask(photo.size[::-1], numpy.random.default_rng(0))[None]
    ours = to_image(_output(model, image, mask, photo.size[::-1]))
    filled = ours, to_image(mean_fill(image, mask)), telea(photo, mask)
    ours_db, mean_db, telea_db = (psnr(picture, photo, 0) for picture in filled)
    return ours_db, mean_db, telea_db


def compare_joint(model: Inpainter, photo: Image.Image, scale: float) -> tuple[float, float]:
    """Returns the PSNR of the network and of a baseline that fill and enlarge a photograph, shrunk by `scale`, with a
    mask over 15 % of its pixels.

    The baseline is Telea's method at scale 1, else bicubic interpolation after a fill with the mean colour.
    """
    small, shown = shrink(photo, scale)
    image = to_tensor(small)
    mask = free_form_mask(small.size[::-1], numpy.random.default_rng(0))[None]
    if scale == 1:
        baseline = telea(small, mask)
    else:
        baseline = to_image(mean_fill(image, mask)).resize(shown.size, Image.Resampling.BICUBIC)
    ours = to_image(_output(model, image, mask, shown.size[::-1]))
    return psnr(ours, shown, 0), psnr(baseline, shown, 0)


def by_scale(
    compare: Callable[[Any, Image.Image, float], tuple[float, float]],
    model: Any,
    photos: Sequence[Image.Image],
    scales: Sequence[float],
    baseline: str,
) -> dict[str, float]:
    """Returns the mean PSNR in dB of a network and of a baseline over photographs, by names such as psnr_x2.

    compare: `compare_upscaling` or `compare_joint`.
    """
    found = {}
    for scale in scales:
        pairs = numpy.array([compare(model, photo, scale) for photo in photos])
        found[f"psnr_x{scale}"], found[f"psnr_{baseline}_x{scale}"] = pairs.mean(0).tolist()
    return found
