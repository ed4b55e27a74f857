"""Runs a network on overlapping tiles of an image."""

from collections.abc import Callable

import torch


def map_tiles(function: Callable[..., torch.Tensor], *inputs: torch.Tensor, side: int, halo: int) -> torch.Tensor:
    """Applies a function that keeps sides tile by tile: [B, C, H, W], channels_last.

    With a halo as wide as the function's receptive field the result is exact.

    Args:
        function: takes the same part of every input; returns [B, C, h, w] for sides of h and w.
        inputs: [B, C_i, H, W].
        side: of a tile, in pixels.
        halo: pixels around a tile that the function sees, too.
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
    assert out is not None  # an image has at least one pixel
    return out
