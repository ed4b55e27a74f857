"""Random masks, 1 = missing."""

import math

import numpy
import torch
from PIL import Image, ImageDraw

SHARE = 0.15  # of the pixels that `free_form_mask` masks, by default
THICKNESS = (4, 12)  # of a stroke, in pixels


def free_form_mask(size: tuple[int, int], rng: numpy.random.Generator, share: float = SHARE) -> torch.Tensor:
    """Draws strokes along random walks, one shape in five an ellipse, until they cover a share of the pixels.

    Args:
        size: (h, w).
        rng: the random generator.
        share: of the pixels to cover, at least.

    Returns:
        [1, h, w] float32, 1 = missing, 0 = known.
    """
    height, width = size
    mask = Image.new("L", (width, height))
    pen, shorter = ImageDraw.Draw(mask), min(size)
    while numpy.asarray(mask).mean() < share:
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        thickness = rng.uniform(*THICKNESS)
        if rng.random() < 0.2:
            a, b = rng.uniform(0.5, 1.5, 2) * thickness
            pen.ellipse((x - a, y - b, x + a, y + b), fill=1)
            continue
        angle, points = rng.uniform(0, 2 * math.pi), [(x, y)]
        for _ in range(rng.integers(2, 8)):
            angle += rng.normal(0, 0.7)
            step = rng.uniform(0.05, 0.2) * min(shorter, 128)
            x, y = x + step * math.cos(angle), y + step * math.sin(angle)
            points.append((x, y))
        pen.line(points, fill=1, width=round(thickness), joint="curve")
        for x, y in points:  # round joints and ends
            pen.ellipse([c + s * thickness / 2 for s in (-1, 1) for c in (x, y)], fill=1)
    return torch.from_numpy(numpy.array(mask, numpy.float32))[None]
