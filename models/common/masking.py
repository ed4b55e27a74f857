"""The image and mask that all inpainting networks take: their check, the known part, and the output's size."""

import math
import numbers
import operator
from typing import Any

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.backends import is_capturing
from inr_kernels._core.checks import require, require_tensor, shape
from inr_kernels.local_implicit.functional import check_size


def check_image(image: torch.Tensor, device: torch.device, *, channels: int = 3, min_side: int = 1) -> None:
    """Raises unless a network on `device` takes the image; arguments and errors: as `check_mask`."""
    require_tensor(image, "image", dims=(4,))
    require(image.device == device, "image", f"be on the network's device {device}", image.device)
    rule = f"have shape [B, {channels}, H, W] with sides of at least {min_side}"
    require(image.shape[1] == channels and min(image.shape[2:]) >= min_side, "image", rule, shape(image))


def check_mask(
    image: torch.Tensor, mask: torch.Tensor, device: torch.device, *, channels: int = 3, min_side: int = 1
) -> torch.Tensor:
    """Checks an image and its mask, and returns the mask as [B, 1, H, W], floating point, in [0, 1].

    Args:
        image: [B, C, H, W], floating point, in [0, 1]. Values under the mask (mask = 1) are ignored, NaNs too.
        mask: [B, 1, H, W] or [B, H, W], bool, integer or floating point; 1 = missing, 0 = known. Values between
            fade the pixel, values outside [0, 1] are clamped, and NaN counts as missing.
        device: of the network.
        channels: C.
        min_side: the smallest H and W that the network takes.

    Returns:
        The mask in its own dtype if that is floating point, else in the image's.

    Raises:
        TypeError: image or mask is not a tensor of these dtypes.
        ValueError: a shape or device that does not fit.
    """
    check_image(image, device, channels=channels, min_side=min_side)
    require_tensor(mask, "mask", integers=True)
    require(mask.device == image.device, "mask", f"be on {image.device}, like image", mask.device)
    batch, _, *sides = image.shape
    rule = f"have shape [B, 1, H, W] = {[batch, 1, *sides]} or [B, H, W] = {[batch, *sides]}"
    require(shape(mask) in ([batch, 1, *sides], [batch, *sides]), "mask", rule, shape(mask))
    mask = mask if mask.is_floating_point() and mask.dtype.itemsize > 1 else mask.to(image.dtype)
    mask = mask.nan_to_num(nan=1).clamp(0, 1)
    return mask if mask.dim() == 4 else mask.unsqueeze(1)


def check_range(image: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Raises unless the image's known values can be meant for [0, 1]; bicubic resampling may overshoot a little.

    Raises:
        ValueError: NaN, infinity, or values below -0.5 or above 1.5, such as those of a picture in 0 ... 255.
    """
    if not image.numel() or not _has_values(image):
        return
    low, high = (t.item() for t in (image if mask is None else known(image, mask)).aminmax())
    if math.isnan(low):
        require(False, "image", "have values in [0, 1]", "NaN" if mask is None else "NaN in a known pixel")
    require(low >= -0.5 and high <= 1.5, "image", "have values in [0, 1]", f"values from {low:g} to {high:g}")


def check_weights(network: Any, out: torch.Tensor) -> None:
    """Raises if a network's output is not finite because its weights are not.

    Raises:
        ValueError: the weights hold NaN or infinity.
    """
    # The sum reads the output once and needs no memory; the weights are read only if it is not finite.
    if not _has_values(out) or out.sum(dtype=torch.promote_types(out.dtype, torch.float32)).isfinite():
        return
    wrong = next((name for name, weight in network.state_dict().items() if not weight.isfinite().all()), None)
    if wrong is not None:
        raise ValueError(f"the weights of this {network.NETWORK} hold NaN or infinity, first in {wrong}")


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether Python may read the tensor's values: not while it is traced, captured or transformed."""
    hidden = torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or tensor.is_meta
    return not (hidden or dispatch.is_transformed(tensor) or is_capturing(tensor.device))


def known(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """I (1 - M) [B, C, H, W] for M [B, 1, H, W] in [0, 1]; NaNs under the mask are ignored."""
    return torch.where(mask < 1, image * (1 - mask), 0)


def blend(image: torch.Tensor, mask: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """M prediction + (1 - M) I for M in [0, 1]; where M = 0 the image's own values, bit for bit."""
    return torch.where(mask == 0, image, known(image, mask) + mask * prediction)


def output_size(image: torch.Tensor, size: tuple[int, int] | None, scale: float | None) -> tuple[int, int]:
    """The requested (H', W'): a size, (round(scale H), round(scale W)), or the image's own.

    Raises:
        TypeError: image is not a floating-point tensor.
        ValueError: both are given, or one is not positive and finite.
    """
    require_tensor(image, "image", dims=(4,))
    sides = list(image.shape[2:])
    if not torch.compiler.is_exporting():  # torch.compile specializes: bands are planned for a shape
        sides = [operator.index(n) for n in sides]
    require(size is None or scale is None, "size", "be None if scale is given", f"{size} and {scale}")
    if size is not None:
        return check_size(size)
    fits = scale is None or (isinstance(scale, numbers.Real) and 0 < scale < float("inf"))
    require(fits, "scale", "be positive and finite", repr(scale))
    height, width = (max(1, n if scale is None else round(n * scale)) for n in sides)
    return height, width
