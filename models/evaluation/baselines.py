"""Classical methods that the networks are compared with."""

import numpy
from PIL import Image


def filled(small, mask):
    """The picture with its known pixels' mean colour in the holes."""
    known = 1 - mask
    mean = (small * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return small * known + mean * mask


def telea(photo, mask):
    """The picture (Pillow), its holes filled by OpenCV's inpainting, Telea's method."""
    import cv2

    holes = mask[0, 0].byte().numpy()
    return Image.fromarray(cv2.inpaint(numpy.array(photo) * (1 - holes[..., None]), holes, 3, cv2.INPAINT_TELEA))
