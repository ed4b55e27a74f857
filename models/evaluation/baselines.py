"""Classical methods that the networks are compared with."""

import numpy
import torch
from PIL import Image


def mean_fill(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Fills the missing pixels of image [B, 3, H, W], mask [B, 1, H, W], with the mean colour of the known ones."""
    known = 1 - mask
    mean = (image * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return image * known + mean * mask


def telea(photo: Image.Image, mask: torch.Tensor) -> Image.Image:
    """Fills the missing pixels of an image by OpenCV's inpainting with Telea's method.

    Args:
        photo: an 8-bit RGB image of H x W pixels.
        mask: [1, 1, H, W], 1 = missing.

    Raises:
        ImportError: OpenCV is not installed.
    """
    import cv2

    holes = mask[0, 0].byte().numpy()
    return Image.fromarray(cv2.inpaint(numpy.array(photo) * (1 - holes[..., None]), holes, 3, cv2.INPAINT_TELEA))
