"""DEAR (SuperInpaint): fills missing pixels and renders at any size."""

from .config import SMALL, DEARConfig
from .losses import dear_loss, sample_queries
from .network import DEAR, DEARFeatures

__all__ = ["DEAR", "SMALL", "DEARConfig", "DEARFeatures", "dear_loss", "sample_queries"]
