"""The smooth fill of missing pixels, from which networks with `fill="smooth"` start."""

import torch
from torch.nn import functional as F

OPEN_LEVELS = 13  # of the pyramid of `smooth_fill` where the size is open: it has one pixel for sides up to 8192


def smooth_fill(known: torch.Tensor, mask: torch.Tensor, sweeps: int = 4) -> torch.Tensor:
    """Fills the missing pixels of I (1 - M) [B, 3, H, W] from their surroundings: approximately the harmonic function.

    It averages the known pixels down a pyramid, and goes up again: on each level the missing pixels start from the
    coarser level and are then relaxed to the mean of their 3 x 3 neighbours. An image without known pixels becomes
    grey.

    Args:
        known: I (1 - M).
        mask: M [B, 1, H, W] in [0, 1].
        sweeps: relaxations per level.
    """
    mean = at_least_float32(known)  # half precision would leave bands
    dtype = mean.dtype
    share = 1 - mask.to(dtype)
    mean = mean / share.where(share > 0, 1)
    levels = [(mean, share)]
    sides = share.shape[2:]
    is_open = any(isinstance(side, torch.SymInt) for side in sides)  # the size, in an exported graph
    for _ in range(OPEN_LEVELS if is_open else (max(sides) - 1).bit_length()):
        sums, share = (F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2) for x in (mean * share, share))  # of half the size, up
        mean, share = sums / share.where(share > 0, 1), (share > 0).to(dtype)
        levels.append((mean, share))
    out = torch.full_like(mean, 0.5)
    for mean, share in reversed(levels):
        out = F.interpolate(out, scale_factor=2, mode="bilinear")[..., : mean.shape[2], : mean.shape[3]]
        for _ in range(sweeps):
            out = torch.lerp(out, mean, share)
            out = F.avg_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, 1)
        out = torch.lerp(out, mean, share)
    return out.to(known.dtype)


def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes an image [B, C, h, w] to [B, C, H, W] by bicubic interpolation, in at least float32."""
    return F.interpolate(at_least_float32(image), size, mode="bicubic")


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Converts half-precision tensors to float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
