"""Neighborhood attention: every pixel attends to a window of pixels around it."""

from .functional import (
    merge_attentions,
    neighborhood_attention_1d,
    neighborhood_attention_2d,
    neighborhood_attention_2d_packed,
)
from .module import NeighborhoodAttention1D, NeighborhoodAttention2D

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "merge_attentions",
    "neighborhood_attention_1d",
    "neighborhood_attention_2d",
    "neighborhood_attention_2d_packed",
]
