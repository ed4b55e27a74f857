"""DEAR (SuperInpaint): fills missing pixels and renders at any size."""

from .network import DEAR, DEARConfig

__all__ = ["DEAR", "DEARConfig"]
