"""Metrics of image quality."""

import math

import numpy
from PIL import Image


def psnr(image: Image.Image, original: Image.Image, border: int) -> float:
    """Returns 10 log10(255² / mean squared error) of two 8-bit images in dB.

    Args:
        image, original: of one size [h, w], grey or RGB.
        border: pixels at each side that are left out.
    """
    inner = slice(border, -border or None)
    a, b = (numpy.asarray(p, dtype=float)[inner, inner] for p in (image, original))
    return 10 * math.log10(255**2 / max(numpy.mean((a - b) ** 2), 1e-10))
