"""Neighborhood attention: every pixel attends to a window of pixels around it."""

from .functional import (
    merge_attentions,
    neighborhood_attention_1d,
    neighborhood_attention_2d,
    neighborhood_attention_2d_packed,
    neighborhood_attention_3d,
)
from .module import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "merge_attentions",
    "neighborhood_attention_1d",
    "neighborhood_attention_2d",
    "neighborhood_attention_2d_packed",
    "neighborhood_attention_3d",
]
