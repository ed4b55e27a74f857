"""What the networks that fill holes share: the known part of a picture, and the size of theirs."""

import numbers

import torch

from inr_kernels._core.checks import require, require_tensor


def known(image, mask):
    """I (1 - M) [B, C, H, W]; NaN in a hole is no matter."""
    return torch.where(mask < 1, image * (1 - mask), 0)


def output_size(image, size, scale):
    """(H', W') as asked: a size, round(scale H) and round(scale W), or the image's own."""
    require_tensor(image, "image", dims=(4,))
    require(size is None or scale is None, "size", "be None beside a scale", f"{size} and {scale}")
    fits = scale is None or (isinstance(scale, numbers.Real) and 0 < scale < float("inf"))
    require(fits, "scale", "be positive and finite", repr(scale))
    return size if size is not None else tuple(max(1, round(n * (scale or 1))) for n in image.shape[2:])
