"""How an image reaches a network that takes certain sizes only: the input processing of published comparisons."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from inr_kernels._core.checks import require

from ..common.masking import blend
from .baselines import Method, mean_fill

Pair = tuple[torch.Tensor, torch.Tensor]
SIDE = 512  # pixels, of a square input
MULTIPLE = 8


def fitted(method: Method, fit: str, side: int = SIDE) -> Method:
    """Returns a filling method that sees another form of the image; known pixels of its output are the image's.

    Args:
        method: (image [1, 3, H, W], mask [1, 1, H, W], (H, W)) -> [1, 3, H, W], in [0, 1].
        fit: "origin": the image as it is. "modulo": mirrored at the right and the bottom to multiples of 8, as LaMa
            does. "resize": resized to a square. "pad-constant", "pad-edge": its longer side resized to `side`, and
            filled up to a square with black or with its border; these three as in the tables of IN²'s paper.
        side: of the square, in pixels.

    Raises:
        ValueError: there is no such fit; by the method, if it is to enlarge an image, with any fit but "origin".
    """
    require(fit in FITS, "fit", f"be one of {', '.join(FITS)}", repr(fit))
    if fit == "origin":
        return method

    def run(image: torch.Tensor, mask: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
        sides = (image.shape[2], image.shape[3])
        require(mask is not None and size == sides, "fit", "be origin for images that are enlarged", fit)
        assert mask is not None
        prediction = FITS[fit](method, image, mask, side)
        return blend(image, mask, prediction)

    return run


def _modulo(method: Method, image: torch.Tensor, mask: torch.Tensor, side: int) -> torch.Tensor:
    height, width = image.shape[2:]

    def mirrored(x: torch.Tensor) -> torch.Tensor:
        for axis in (2, 3):
            n = x.shape[axis]
            index = torch.arange(-(-n // MULTIPLE) * MULTIPLE, dtype=torch.long, device=x.device)
            x = x.index_select(axis, torch.where(index < n, index, (2 * n - 1 - index).clamp(min=0)))
        return x

    image, mask = mirrored(image), mirrored(mask)
    return method(image, mask, (image.shape[2], image.shape[3]))[..., :height, :width]


def _resize(method: Method, image: torch.Tensor, mask: torch.Tensor, side: int) -> torch.Tensor:
    return resized(method(*shrunk(image, mask, (side, side)), (side, side)), (image.shape[2], image.shape[3]))


def _pad(mode: str) -> Callable[[Method, torch.Tensor, torch.Tensor, int], torch.Tensor]:
    def padded(method: Method, image: torch.Tensor, mask: torch.Tensor, side: int) -> torch.Tensor:
        height, width = image.shape[2:]
        h, w = (max(1, round(n * side / max(height, width))) for n in (height, width))
        small, holes = shrunk(image, mask, (h, w))
        around = (0, side - w, 0, side - h)
        square = F.pad(small, around, mode=mode), F.pad(holes, around)
        return resized(method(*square, (side, side))[..., :h, :w], (height, width))

    return padded


FITS: dict[str, Callable[[Method, torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "origin": lambda method, image, mask, side: method(image, mask, (image.shape[2], image.shape[3])),
    "modulo": _modulo,
    "resize": _resize,
    "pad-constant": _pad("constant"),
    "pad-edge": _pad("replicate"),
}


def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes an image [B, C, h, w] to (H, W), bicubic, with antialiasing where it shrinks."""
    return F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1)


def shrunk(image: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]) -> Pair:
    """Resizes an image and its mask; a pixel that shows a part of a hole is missing.

    The holes get the mean colour before, so that they do not darken the known pixels around them.
    """
    missing = F.interpolate(mask.float(), size, mode="area") > 0
    return resized(mean_fill(image, mask), size), missing.to(mask.dtype)
