"""LIIF's recipe. See `upscaling` for samples and loss."""

from ..liif.network import LIIF
from .upscaling import EXTRAS, Objective, Options, check, draw, sample, show, validate

__all__ = ["EXTRAS", "NETWORK", "Objective", "Options", "check", "draw", "sample", "show", "validate"]

NETWORK = LIIF
