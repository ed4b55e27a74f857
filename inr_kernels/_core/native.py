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


# From this number of bytes on, glibc's allocator asks the system for fresh pages at every call. The system clears them,
# which takes longer than many kernels take to fill them.
_LARGE = 32 << 20


def empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """An uninitialized CPU tensor of like's dtype; a large one is in memory from the native buffer pool.

    The storage of a large tensor cannot be resized.
    """
    is_large = math.prod(shape) * like.element_size() >= _LARGE
    return _pooled(shape, like) if is_large else like.new_empty(shape)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialized, contiguous tensor like this CPU tensor, in memory from the native buffer pool."""
    return _pooled(tensor.shape, tensor) if tensor.numel() else tensor.new_empty(tensor.shape)


def _pooled(shape, like):
    memory = load()[0].Memory(math.prod(shape) * like.element_size())
    # Not a view of a flat tensor: autograd restricts changes of views in place.
    storage = torch.frombuffer(memory, dtype=like.dtype).untyped_storage()
    return like.new_empty(0).set_(storage, 0, shape)


def release_memory() -> None:
    """Returns the working memory that the C++ kernels keep between calls, at most 128 MB, to the system.

    Example:
        >>> import inr_kernels
        >>> inr_kernels.release_memory()
    """
    if library := load()[0]:
        library.release_memory()


load()  # on import: the library must be notified of every fork
