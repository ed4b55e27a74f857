"""IN²'s recipe. See `filling` for the losses, and configs/in2_paper.yaml for the paper's values."""

from ..in2.network import IN2
from .filling import FillingOptions as Options
from .filling import Objective, check, draw, sample, show, take_over, validate

__all__ = ["NETWORK", "Objective", "Options", "begin", "check", "draw", "sample", "show", "validate"]

NETWORK = IN2
EXTRAS = {"cv2": "opencv-python-headless"}  # of the validation


def begin(model: IN2, start: IN2) -> None:
    """See `filling.take_over`."""
    take_over(model, start, model.decoder.head)
