"""DEAR (SuperInpaint): fills holes and renders at any size."""

from .network import DEAR, DEARConfig

__all__ = ["DEAR", "DEARConfig"]
