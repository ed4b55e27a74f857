"""Unmask attention: an image's pixels attend to each other, those of a hole to all alike."""

from .functional import unmask_attention
from .module import UnmaskAttention

__all__ = ["UnmaskAttention", "unmask_attention"]
