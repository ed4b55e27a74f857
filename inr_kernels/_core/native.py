"""The compiled module `inr_kernels._C`, or the reason why it is not available."""

import functools
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


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialized, contiguous tensor like this CPU tensor, in memory from the native buffer pool."""
    if not tensor.numel():
        return tensor.new_empty(tensor.shape)
    memory = load()[0].Memory(tensor.numel() * tensor.element_size())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def release_memory() -> None:
    """Returns the working memory that the C++ kernels keep between calls, at most 64 MB, to the system.

    Example:
        >>> import inr_kernels
        >>> inr_kernels.release_memory()
    """
    if library := load()[0]:
        library.release_memory()


load()  # on import: the library must be notified of every fork
