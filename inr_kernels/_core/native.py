"""The compiled module `inr_kernels._C`, or the reason why it is not available."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch


@functools.cache
def load() -> tuple[Any, str]:
    """`(module, "")`, or `(None, reason)` where the extension does not import."""
    try:
        from inr_kernels import _C
    except ImportError as error:
        return None, f"inr_kernels._C does not import ({error}); build it with `pip install -e .`"
    return _C, ""


def empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """An uninitialized CPU tensor of like's dtype. Large ones are in memory from the native buffer pool.

    For 32 MB and more, the system's allocator asks for fresh pages at every call, which take longer to clear than many
    kernels to fill.
    """
    pooled = math.prod(shape) * like.element_size() >= 32 << 20
    return _pooled(shape, like) if pooled else like.new_empty(shape)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialized, contiguous tensor like this CPU tensor, in memory from the native buffer pool."""
    return _pooled(tensor.shape, tensor) if tensor.numel() else tensor.new_empty(tensor.shape)


def _pooled(shape, like):
    memory = load()[0].Memory(math.prod(shape) * like.element_size())
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def release_memory() -> None:
    """Returns the working memory that the C++ kernels keep between calls, at most 128 MB, to the system.

    Example:
        >>> import inr_kernels
        >>> inr_kernels.release_memory()
    """
    if library := load()[0]:
        library.release_memory()


load()  # on import: the library must be notified of every fork
