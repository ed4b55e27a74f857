"""Neighborhood attention: every pixel attends to a window of pixels around it."""

from .functional import neighborhood_attention_2d, neighborhood_attention_2d_packed
from .module import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D", "neighborhood_attention_2d", "neighborhood_attention_2d_packed"]
