"""LaMa's recipe: the losses of `filling`. LaMa's own perceptual loss, of a ResNet-50 trained on ADE20K, is not here."""

from ..lama.network import LaMa
from .filling import FillingOptions as Options
from .filling import Objective, check, draw, sample, show, validate

__all__ = ["NETWORK", "Objective", "Options", "check", "draw", "sample", "show", "validate"]

NETWORK = LaMa
EXTRAS = {"cv2": "opencv-python-headless"}  # of the validation
