"""Random masks, 1 = missing. `draw(kind, height, width, rng)` draws one of the kinds in `KINDS`."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw

from inr_kernels._core.checks import require

from .images import Picture

SHARE = 0.15  # of the pixels that `free_form_mask` masks, by default
THICKNESS = (4, 12)  # of a stroke, in pixels
LARGEST = 0.5  # the largest share of a test mask of LaMa
TRIES = 50  # LaMa's: 10 attempts of 5 variants
SHARES = {"strokes": (20.0, 30.0), "noise": (10.0, 90.0)}  # in percent, of the kinds that take a range

Rng = numpy.random.Generator
Range = tuple[int, int]


def draw(kind: str, height: int, width: int, rng: Rng) -> numpy.ndarray:
    """Draws a mask; the same state of `rng` gives the same mask.

    Kinds:
        thin, medium, thick: LaMa's test masks, strokes and boxes over at most half of the picture. Of the published
            parameters for 256 and 512 pixels, those whose side is nearer to the picture's shorter side.
        mixed: LaMa's training masks, strokes or boxes; box: its boxes alone.
        strokes: brush strokes whose thickness follows the picture's size, over 20 to 30 % of the pixels, as IN²'s
            paper has it. "strokes:5-15" covers another range, "strokes:15" one share.
        noise: each pixel with probability p ~ U(0.1, 0.9), as in "Implicit Image Inpainting"; also "noise:50".

    Args:
        kind: one of `KINDS`; `strokes` and `noise` may be followed by a colon and a range in percent.
        height, width: of the mask, in pixels.
        rng: the random generator.

    Returns:
        [height, width], bool, True = missing.

    Raises:
        ValueError: there is no such kind, the range is none, or a side is not positive.

    Source: the parameters are those of Suvorov et al., Resolution-robust Large Mask Inpainting with Fourier
    Convolutions, WACV 2022 (`random_{thin,medium,thick}_{256,512}.yaml`, `abl-04-256-mh-dist-celeba.yaml`).

    Example:
        >>> draw("thin", 256, 256, numpy.random.default_rng(0)).shape
        (256, 256)
    """
    name, share = parse(kind)
    require(min(height, width) > 0, "height and width", "be positive", f"{height} and {width}")
    if share is not None:
        drawing = strokes if name == "strokes" else noise
        return drawing(height, width, rng, share)
    return KINDS[name](height, width, rng)


def parse(kind: str) -> tuple[str, tuple[float, float] | None]:
    """Splits "strokes:20-30" into the kind and its range of shares, here (0.2, 0.3); None if the kind has none.

    Raises:
        ValueError: there is no such kind, or the range is none.
    """
    name, _, text = kind.partition(":")
    require(name in KINDS, "kind", f"be one of {', '.join(KINDS)}", repr(kind))
    require(not text or name in SHARES, "kind", f"have a range only after {' or '.join(SHARES)}", repr(kind))
    if name not in SHARES:
        return name, None
    found = re.fullmatch(r"(\d+\.?\d*)(?:-(\d+\.?\d*))?", text or "{:g}-{:g}".format(*SHARES[name]))
    low, high = (float(found[1]), float(found[2] or found[1])) if found else (math.nan, math.nan)
    require(0 <= low <= high <= 100, "kind", f"be like {name}:20-30 or {name}:15, in percent", repr(kind))
    return name, (low / 100, high / 100)


class Strokes(NamedTuple):
    """LaMa's parameters of strokes. times: number of polygonal lines; width, length: of a line, in pixels."""

    times: Range
    width: int
    length: int


class Boxes(NamedTuple):
    """LaMa's parameters of boxes. times: their number; sides, margin: in pixels."""

    times: Range
    sides: Range
    margin: int


class Mix(NamedTuple):
    """Strokes, or with probability `share` boxes."""

    strokes: Strokes
    boxes: Boxes
    share: float


_TRAINING = Mix(Strokes((1, 5), 100, 200), Boxes((1, 4), (30, 150), 10), 1 / 2)
_NO_BOXES = Boxes((0, 0), (1, 1), 0)
TESTS = {  # for pictures whose shorter side has 256 and 512 pixels; boxes have 0.3 / 1.3 of the probability
    "thin": {256: Mix(Strokes((4, 50), 10, 40), _NO_BOXES, 0), 512: Mix(Strokes((4, 70), 20, 100), _NO_BOXES, 0)},
    "medium": {
        256: Mix(Strokes((4, 5), 50, 100), Boxes((1, 5), (10, 50), 0), 3 / 13),
        512: Mix(Strokes((4, 10), 100, 200), Boxes((1, 5), (30, 150), 0), 3 / 13),
    },
    "thick": {
        256: Mix(Strokes((1, 5), 100, 200), Boxes((1, 3), (30, 150), 10), 3 / 13),
        512: Mix(Strokes((1, 5), 250, 450), Boxes((1, 4), (30, 300), 10), 3 / 13),
    },
}


def _test(kind: str, height: int, width: int, rng: Rng) -> numpy.ndarray:
    """The first of `TRIES` masks that covers at most half of the picture, else the smallest of them."""
    mix = TESTS[kind][512 if min(height, width) > 256 * math.sqrt(2) else 256]
    smallest = numpy.ones((height, width), bool)
    for _ in range(TRIES):
        mask = _mixed(mix, height, width, rng)
        smallest = min(smallest, mask, key=numpy.mean)
        if smallest.mean() <= LARGEST:
            break
    return smallest


def _mixed(mix: Mix, height: int, width: int, rng: Rng) -> numpy.ndarray:
    boxes = rng.random() < mix.share
    return _boxes(mix.boxes, height, width, rng) if boxes else _lines(mix.strokes, height, width, rng)


def _lines(parameters: Strokes, height: int, width: int, rng: Rng) -> numpy.ndarray:
    """Lines of 1 to 5 segments whose directions are a few radians, every other mirrored.

    As LaMa's generator, which draws up to one more line than its parameter says.
    """
    mask = numpy.zeros((height, width), bool)
    for i in range(rng.integers(parameters.times[0], parameters.times[1] + 1, endpoint=True)):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        for _ in range(rng.integers(1, 6)):
            angle = (0.01 + rng.integers(4)) * (-1 if i % 2 == 0 else 1)
            length, thickness = 10 + rng.integers(parameters.length), 5 + int(rng.integers(parameters.width))
            end_x = min(max(int(x + length * math.sin(angle)), 0), width)
            end_y = min(max(int(y + length * math.cos(angle)), 0), height)
            _segment(mask, (x, y), (end_x, end_y), thickness)
            x, y = end_x, end_y
    return mask


def _segment(mask: numpy.ndarray, start: Range, end: Range, thickness: int) -> None:
    """Marks the pixels within half the thickness, rounded up, of a segment, which is about what OpenCV's line marks.

    start, end: (x, y).
    """
    radius = (thickness + 1) // 2  # OpenCV rounds edges outwards: 0.4 pixels
    left, top = (max(0, min(a, b) - radius) for a, b in zip(start, end, strict=True))
    right, bottom = (max(a, b) + radius + 1 for a, b in zip(start, end, strict=True))
    part = mask[top:bottom, left:right]
    y, x = numpy.ogrid[: part.shape[0], : part.shape[1]]
    x, y = x + left - start[0], y + top - start[1]
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = numpy.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1), 0, 1)  # the nearest point of the segment
    part |= (x - along * dx) ** 2 + (y - along * dy) ** 2 <= (radius + 0.4) ** 2


def _boxes(parameters: Boxes, height: int, width: int, rng: Rng) -> numpy.ndarray:
    """Boxes at least `margin` pixels from the border; in a picture that is too small for them, smaller ones."""
    mask = numpy.zeros((height, width), bool)
    shorter = min(height, width)
    margin = min(parameters.margin, (shorter - 1) // 2)
    largest = min(parameters.sides[1], shorter - 2 * margin)
    smallest = min(parameters.sides[0], largest)
    for _ in range(rng.integers(*parameters.times, endpoint=True)):
        h, w = rng.integers(smallest, largest, 2, endpoint=True)
        top, left = rng.integers(margin, height - margin - h + 1), rng.integers(margin, width - margin - w + 1)
        mask[top : top + h, left : left + w] = True
    return mask


def strokes(height: int, width: int, rng: Rng, share: tuple[float, float] = (0.2, 0.3)) -> numpy.ndarray:
    """Draws strokes, of 2 to 8 % of the shorter side in thickness, until they cover a share within a range.

    Args:
        height, width: of the mask, in pixels.
        rng: the random generator.
        share: the range; the mask's share is uniform in it, up to the pixels of a stroke.

    Returns:
        [height, width], bool, True = missing.
    """
    low, high = share
    target, shorter = rng.uniform(low, high), min(height, width)
    thickness = max(1, 0.02 * shorter), max(1, 0.08 * shorter)
    mask, covered, left = Image.new("L", (width, height)), 0.0, TRIES
    while covered < target and (left or covered < low):
        more = mask.copy()
        _stroke(ImageDraw.Draw(more), (height, width), rng, thickness, shorter)
        share_of_more = numpy.asarray(more).mean()
        if share_of_more > max(high, low + 0.02) and left:  # covers too much: try others, some times
            left -= 1
        else:
            mask, covered = more, share_of_more
    return numpy.array(mask, bool)


def noise(height: int, width: int, rng: Rng, share: tuple[float, float] = (0.1, 0.9)) -> numpy.ndarray:
    """Draws every pixel with one probability p, uniform in the range `share`; [height, width], bool."""
    return rng.random((height, width)) < rng.uniform(*share)


KINDS: dict[str, Callable[[int, int, Rng], numpy.ndarray]] = {
    "thin": lambda height, width, rng: _test("thin", height, width, rng),
    "medium": lambda height, width, rng: _test("medium", height, width, rng),
    "thick": lambda height, width, rng: _test("thick", height, width, rng),
    "mixed": lambda height, width, rng: _mixed(_TRAINING, height, width, rng),
    "box": lambda height, width, rng: _boxes(_TRAINING.boxes, height, width, rng),
    "strokes": strokes,
    "noise": noise,
}


def free_form_mask(size: tuple[int, int], rng: Rng, share: float = SHARE) -> torch.Tensor:
    """Draws strokes along random walks, one shape in five an ellipse, until they cover a share of the pixels.

    Their thickness is 4 to 12 pixels in a picture of any size.

    Args:
        size: (h, w).
        rng: the random generator.
        share: of the pixels to cover, at least.

    Returns:
        [1, h, w] float32, 1 = missing, 0 = known.
    """
    height, width = size
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    while numpy.asarray(mask).mean() < share:
        _stroke(pen, size, rng, THICKNESS, min(*size, 128))
    return torch.from_numpy(numpy.array(mask, numpy.float32))[None]


def _stroke(pen: ImageDraw.ImageDraw, size: Range, rng: Rng, thicknesses: tuple[float, float], reach: int) -> None:
    """A line along a random walk whose steps are 5 to 20 % of `reach`, or in one of five cases an ellipse."""
    height, width = size
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    thickness = rng.uniform(*thicknesses)
    if rng.random() < 0.2:
        a, b = rng.uniform(0.5, 1.5, 2) * thickness
        pen.ellipse((x - a, y - b, x + a, y + b), fill=1)
        return
    angle, points = rng.uniform(0, 2 * math.pi), [(x, y)]
    for _ in range(rng.integers(2, 8)):
        angle += rng.normal(0, 0.7)
        step = rng.uniform(0.05, 0.2) * reach
        x, y = x + step * math.cos(angle), y + step * math.sin(angle)
        points.append((x, y))
    pen.line(points, fill=1, width=round(thickness), joint="curve")
    for x, y in points:  # round joints and ends
        pen.ellipse([c + s * thickness / 2 for s in (-1, 1) for c in (x, y)], fill=1)


def opacity(picture: Picture) -> torch.Tensor:
    """Returns brightness times opacity, [1, 1, h, w] in [0, 1]: strokes on a transparent layer make a mask, too."""
    mask = picture.colour.mean(1, keepdim=True)
    return mask if picture.alpha is None else mask * picture.alpha


def from_picture(picture: Picture) -> torch.Tensor:
    """Returns the mask that a picture shows, [1, 1, h, w], float32: 1 where its opacity is at least half."""
    return (opacity(picture) >= 0.5).float()
