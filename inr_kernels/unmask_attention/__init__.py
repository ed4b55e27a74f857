"""Unmask attention: every pixel attends to all pixels; masked pixels attend to all of them equally."""

from .functional import unmask_attention
from .module import UnmaskAttention

__all__ = ["UnmaskAttention", "unmask_attention"]
