"""Runs a network on overlapping tiles of an image."""

from collections.abc import Callable

import torch

from .progress import Progress


def map_tiles(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, side: int, halo: int, progress: Progress = None
) -> torch.Tensor:
    """Applies a function that keeps sides tile by tile: [B, C, H, W], channels_last.

    With a halo as wide as the function's receptive field the result is exact.

    Args:
        function: takes the same part of every input; returns [B, C, h, w] for sides of h and w.
        inputs: [B, C_i, H, W].
        side: of a tile, in pixels.
        halo: pixels around a tile that the function sees, too.
        progress: called after each tile as progress(pixels done, pixels in all).
    """
    height, width = inputs[0].shape[2:]
    out = None
    for top in range(0, height, side):
        for left in range(0, width, side):
            y, x = max(top - halo, 0), max(left - halo, 0)
            bottom, right = top + side, left + side
            tile = function(*(part[..., y : bottom + halo, x : right + halo] for part in inputs))
            if out is None:
                size = (*tile.shape[:2], height, width)
                out = torch.empty(size, dtype=tile.dtype, device=tile.device, memory_format=torch.channels_last)
            out[..., top:bottom, left:right] = tile[..., top - y : bottom - y, left - x : right - x]
            if progress is not None:
                rows, columns = min(bottom, height) - top, min(right, width)
                progress(top * width + rows * columns, height * width)
    assert out is not None  # an image has at least one pixel
    return out


def pixels_with_halo(size: tuple[int, int], side: int, halo: int) -> int:
    """The pixels of all tiles of `map_tiles` for an image of that size (H, W), those around the tiles included."""

    def along(length: int) -> int:
        return sum(min(at + side + halo, length) - max(at - halo, 0) for at in range(0, length, side))

    return along(size[0]) * along(size[1])
