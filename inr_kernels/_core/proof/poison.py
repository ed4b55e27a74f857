"""Memory full of NaN, so that an output element that a kernel does not write shows."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from inr_kernels._core import native

_MAKERS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch.Tensor, "new_empty"),
    (native, "empty"),
    (native, "empty_like"),
]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """In the block, uninitialized tensors are filled with NaN, those of integers with their largest value."""
    with torch.device("cpu"):  # torch lists the functions that a default device applies to once: the unpatched ones
        torch.empty(0, dtype=torch.float32, device="cpu")
    with contextlib.ExitStack() as stack:
        for owner, name in _MAKERS:
            stack.enter_context(mock.patch.object(owner, name, _poisoned(getattr(owner, name))))
        yield


def _poisoned(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        out = make(*args, **kwargs)
        # Subclasses (fake, functional) and tensors that Dynamo traces have no memory.
        if torch.compiler.is_compiling() or type(out) is not torch.Tensor or out.is_meta:
            return out
        if out.dtype == torch.bool:
            return out
        exact = not (out.is_floating_point() or out.is_complex())
        with torch.no_grad():
            return out.fill_(torch.iinfo(out.dtype).max if exact else float("nan"))

    return wrapper
