"""Metrics of image quality, and the conventions by which published tables compute them."""

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image

from inr_kernels._core.checks import require

LUMA = (65.738 / 256, 129.057 / 256, 25.064 / 256)  # of ITU-R BT.601, without its offset
WINDOW = 11  # pixels, of SSIM


@dataclass(frozen=True)
class Convention:
    """How two pictures are compared.

    Attributes:
        about: where it comes from, and what it does.
        luma: compare the luminance Y alone instead of R, G and B. LPIPS and FID always see all colours.
        border: pixels at each side that are left out.
        border_scales: leave out the scale, rounded up, in addition.
        levels: of the prediction and the target: "float", or 8 bits by "round" or "truncate".
        window: of SSIM. "gaussian": sigma 1.5, within the picture; "zero-padded": the same, also at the border, with
            zeros around the picture; "uniform": an 11 x 11 mean with sample covariances, scikit-image's default.
        lpips: the network of LPIPS in these tables, "alex" or "vgg".
        fit: how an image reaches a network, see `evaluation.fitting.FITS`.
    """

    about: str
    luma: bool = False
    border: int = 0
    border_scales: bool = False
    levels: str = "float"
    window: str = "gaussian"
    lpips: str = "alex"
    fit: str = "origin"

    def cropped(self, scale: float) -> slice:
        """The pixels of a side that count, of a picture that was enlarged by `scale`."""
        border = self.border + (math.ceil(scale) if self.border_scales else 0)
        return slice(border, -border or None)


CONVENTIONS = {
    "plain": Convention("RGB, rounded to 8 bits, as a file would hold them", levels="round"),
    "liif": Convention("LIIF's benchmarks: luminance, without a border of the scale", luma=True, border_scales=True),
    "liif-div2k": Convention("LIIF on DIV2K: RGB, without a border of scale + 6 pixels", border=6, border_scales=True),
    "lama": Convention(
        "LaMa: RGB, 8 bits by truncation, SSIM with zero padding, LPIPS of VGG-16, sides padded to multiples of 8",
        levels="truncate",
        window="zero-padded",
        lpips="vgg",
        fit="modulo",
    ),
    "coordfill": Convention(
        "CoordFill: RGB, 8 bits by truncation, SSIM of scikit-image with a window of 11 pixels",
        levels="truncate",
        window="uniform",
    ),
    "dear": Convention("DEAR: RGB; the paper states neither rounding nor SSIM's window, here none and the usual one"),
    "in2": Convention(
        "IN²: as CoordFill, which the paper follows; it does not state its own", levels="truncate", window="uniform"
    ),
}


def levels(image: torch.Tensor, kind: str) -> torch.Tensor:
    """Returns an image in [0, 1] with the levels of a `Convention`: "float", "round" or "truncate"."""
    image = image.float().clamp(0, 1)
    if kind == "float":
        return image
    # float32 holds n / 255 a little below or above.
    return (image * 255 + (0.5 if kind == "round" else 1e-3)).floor() / 255


def compare(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    convention: Convention = CONVENTIONS["plain"],
    scale: float = 1,
) -> dict[str, float]:
    """Compares a picture with its original.

    Args:
        prediction, target: [1, 3, H, W] in [0, 1].
        mask: [1, 1, H, W], 1 = missing, or None.
        convention: what is compared.
        scale: by which the prediction was enlarged; it determines the border of some conventions.

    Returns:
        "psnr": 10 log10(1 / mean squared error) in dB, infinite for equal pictures. "ssim": structural similarity, at
        most 1. "l1": mean absolute error, of [0, 1]. With a mask "psnr_holes": PSNR of the missing pixels alone, NaN
        without any.

    Raises:
        ImportError: torchmetrics, or for some conventions scikit-image, is not installed.
        ValueError: the shapes differ, or a side that counts is shorter than 11 pixels.
    """
    require(
        prediction.shape == target.shape, "prediction", f"have the target's shape {[*target.shape]}", prediction.shape
    )
    a, b = (levels(image, convention.levels).double() for image in (prediction, target))
    if convention.luma:
        a, b = (torch.einsum("bchw,c->bhw", image, image.new_tensor(LUMA))[:, None] for image in (a, b))
    inner = convention.cropped(scale)
    a, b = a[..., inner, inner], b[..., inner, inner]
    require(min(a.shape[2:]) >= WINDOW, "the picture", f"have sides of at least {WINDOW} pixels", [*a.shape[2:]])
    found = {"psnr": _psnr(a, b), "ssim": _ssim(a, b, convention.window), "l1": (a - b).abs().mean().item()}
    if mask is not None:
        holes = (mask[..., inner, inner] > 0).expand_as(a)
        found["psnr_holes"] = _psnr(a[holes], b[holes]) if holes.any() else math.nan
    return found


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return _torchmetrics().peak_signal_noise_ratio(a, b, data_range=1.0).item()


def _ssim(a: torch.Tensor, b: torch.Tensor, window: str) -> float:
    if window == "uniform":
        try:
            from skimage.metrics import structural_similarity
        except ImportError as error:
            raise ImportError("this convention needs scikit-image: pip install 'inr-kernels[evaluate]'") from error
        pair = (image[0].numpy() for image in (a, b))
        return float(structural_similarity(*pair, win_size=WINDOW, data_range=1, channel_axis=0))
    if window == "zero-padded":  # whose inner part has a value for each pixel
        a, b = (F.pad(image, [WINDOW // 2] * 4) for image in (a, b))
    a, b = a.float(), b.float()  # whose convolutions are much faster
    # Its mean would also count windows beyond the border, where the picture is mirrored.
    _, values = _torchmetrics().structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    inner = slice(WINDOW // 2, -(WINDOW // 2))
    return values[..., inner, inner].mean().item()


def _torchmetrics() -> Any:
    """torchmetrics' functions of images: imported here, as training and the demo need the rest of this file only."""
    try:
        return importlib.import_module("torchmetrics.functional.image")
    except ImportError as error:
        raise ImportError("evaluation needs torchmetrics: pip install 'inr-kernels[evaluate]'") from error


def psnr(image: Image.Image, original: Image.Image, border: int) -> float:
    """Returns 10 log10(255² / mean squared error) of two 8-bit images in dB.

    Args:
        image, original: of one size [h, w], grey or RGB.
        border: pixels at each side that are left out.
    """
    inner = slice(border, -border or None)
    a, b = (numpy.asarray(p, dtype=float)[inner, inner] for p in (image, original))
    return 10 * math.log10(255**2 / max(numpy.mean((a - b) ** 2), 1e-10))
