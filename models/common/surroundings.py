"""Fills the holes of a large image from their surroundings only: the crop strategy of IOPaint and other tools."""

import math
from collections.abc import Callable, Iterator

import torch

from .progress import Progress, shares

MARGIN = 128  # pixels around a hole; IOPaint's default

Fill = Callable[[torch.Tensor, torch.Tensor, Progress], torch.Tensor]


def surroundings(mask: torch.Tensor, margin: int = MARGIN, min_side: int = 1) -> list[tuple[slice, slice]]:
    """Returns the rows and columns of the parts of an image that hold its holes with their surroundings.

    Every hole is in one part, at least `margin` pixels away from its border, except at the image's. Two parts do not
    overlap unless `min_side` enlarges them.

    Args:
        mask: [1, 1, H, W], 1 = missing; every pixel above 0 belongs to a hole.
        margin: pixels around the holes.
        min_side: the shortest side of a part, in pixels, if the image is as large.

    Example:
        >>> mask = torch.zeros(1, 1, 100, 200)
        >>> mask[..., 10:20, 10:30] = mask[..., 50:60, 150:190] = 1
        >>> surroundings(mask, margin=8)
        [(slice(2, 28, None), slice(2, 38, None)), (slice(42, 68, None), slice(142, 198, None))]
    """
    sides = mask.shape[2:]

    def grown(start: int, stop: int, side: int) -> slice:
        first = max(min(start - margin, side - min_side), 0)
        return slice(first, min(max(stop + margin, first + min_side), side))

    boxes = _boxes(mask[0, 0].cpu() > 0, 2 * margin, 0, 0)
    return [(grown(top, bottom, sides[0]), grown(left, right, sides[1])) for top, bottom, left, right in boxes]


def fill_surroundings(
    fill: Fill,
    image: torch.Tensor,
    mask: torch.Tensor,
    margin: int = MARGIN,
    min_side: int = 1,
    progress: Progress = None,
) -> torch.Tensor:
    """Returns the image [1, 3, H, W] with its holes filled by `fill`, which sees their surroundings only.

    Args:
        fill: takes a part of the image, of the mask, and a progress callback; returns the filled part.
        image: [1, 3, H, W].
        mask: [1, 1, H, W], 1 = missing.
        margin, min_side: as of `surroundings`.
        progress: called as progress(done, total), see `common.progress`.
    """
    out, parts = image.clone(), surroundings(mask, margin, min_side)
    if progress is None:
        reports: list[Progress] = [None for _ in parts]
    else:
        reports = [*shares(progress, *(math.prod(side.stop - side.start for side in part) for part in parts))]
    for (rows, columns), report in zip(parts, reports, strict=True):
        part = (..., rows, columns)
        out[part] = torch.where(mask[part] > 0, fill(image[part], mask[part], report), out[part])
    if progress is not None and not parts:
        progress(1, 1)
    return out


def _boxes(holes: torch.Tensor, gap: int, top: int, left: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (top, bottom, left, right) of groups of holes [h, w] that more than `gap` rows or columns separate.

    top, left: of `holes` in the image.
    """
    for first, last in _runs(holes.any(1), gap):
        band = holes[first:last]
        for start, stop in _runs(band.any(0), gap):
            part = band[:, start:stop]
            if part.shape == holes.shape:
                yield top, top + last, left, left + stop
            else:
                yield from _boxes(part, gap, top + first, left + start)


def _runs(used: torch.Tensor, gap: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of the runs of used indices between which more than `gap` are unused."""
    index = used.nonzero().flatten()
    if len(index):
        after = (index.diff() > gap + 1).nonzero().flatten() + 1
        yield from ((int(run[0]), int(run[-1]) + 1) for run in index.tensor_split(after))
