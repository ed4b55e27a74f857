"""Compares networks with baselines on a photograph."""

import math

import numpy
from PIL import Image

from ..common.network import Inpainter
from ..data.images import shrink, to_image, to_tensor
from ..data.masks import free_form_mask
from ..liif import LIIF
from .baselines import mean_fill, telea
from .metrics import psnr


def compare_upscaling(model: LIIF, photo: Image.Image, scale: float) -> tuple[float, float]:
    """Returns the PSNR of the network and of bicubic interpolation on a photograph that was shrunk by `scale`.

    A border of `scale` pixels does not count.
    """
    small, shown = shrink(photo, scale)
    ours = to_image(model.upscale(to_tensor(small), size=shown.size[::-1]))
    border = math.ceil(scale)
    ours_db, bicubic_db = (psnr(p, shown, border) for p in (ours, small.resize(shown.size, Image.Resampling.BICUBIC)))
    return ours_db, bicubic_db


def compare_inpainting(model: Inpainter, photo: Image.Image) -> tuple[float, float, float]:
    """Returns the PSNR of the network, of the mean colour and of Telea's method on a photograph with a mask over 15 %
    of its pixels.
    """
    image = to_tensor(photo)
    mask = free_form_mask(photo.size[::-1], numpy.random.default_rng(0))[None]
    filled = to_image(model.inpaint(image, mask)), to_image(mean_fill(image, mask)), telea(photo, mask)
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
    ours = to_image(model.inpaint(image, mask, shown.size[::-1]))
    return psnr(ours, shown, 0), psnr(baseline, shown, 0)
