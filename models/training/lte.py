"""LTE's recipe: that of LIIF, as in its paper."""

from ..liif.lte import LTE
from .upscaling import EXTRAS, Objective, Options, check, draw, sample, show, validate

__all__ = ["EXTRAS", "NETWORK", "Objective", "Options", "check", "draw", "sample", "show", "validate"]

NETWORK = LTE
