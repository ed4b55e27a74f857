"""The compiled module `inr_kernels._C`, or the reason why there is none."""

import functools

import torch


@functools.cache
def load():
    """`(module, "")`, or `(None, reason)` where the extension does not import."""
    try:
        from inr_kernels import _C
    except ImportError as error:
        return None, f"inr_kernels._C does not import ({error}); build it with `pip install -e .`"
    return _C, ""


def empty_like(tensor):
    """An uninitialised, contiguous tensor as this CPU tensor, in memory that an earlier one may have left."""
    if not tensor.numel():
        return tensor.new_empty(tensor.shape)
    memory = load()[0].Memory(tensor.numel() * tensor.element_size())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


load()  # at once, as the library has to hear of every fork
