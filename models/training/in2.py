"""IN²'s recipe. See `filling` for the losses, and configs/in2_paper.yaml for the paper's values."""

from torch import nn

from ..in2.network import IN2
from .filling import FillingOptions as Options
from .filling import Objective, check, draw, sample, show, validate

__all__ = ["NETWORK", "Objective", "Options", "begin", "check", "draw", "sample", "show", "validate"]

NETWORK = IN2
EXTRAS = {"cv2": "opencv-python-headless"}  # of the validation


def begin(model: IN2, start: IN2) -> None:
    """Takes over the parameters of a checkpoint.

    If the network adds to a smooth fill, and the checkpoint's does not, its last layer becomes zero: the first output
    is then the fill.
    """
    model.load_state_dict(start.state_dict())
    if model.config.fill == "smooth" and start.config.fill != "smooth":
        for parameter in model.decoder.head.parameters():
            nn.init.zeros_(parameter)
