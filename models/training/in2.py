"""IN²'s recipe. See `filling` for the losses, and configs/in2_paper.yaml for the paper's values."""

from ..in2.network import IN2
from .filling import FillingOptions as Options
from .filling import Objective, check, draw, sample, show, validate

__all__ = ["NETWORK", "Objective", "Options", "check", "draw", "sample", "show", "validate"]

NETWORK = IN2
EXTRAS = {"cv2": "opencv-python-headless"}  # of the validation
