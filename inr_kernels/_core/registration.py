"""The library `torch.ops.inr_kernels`, in which every op defines its schemas."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

LIBRARY = torch.library.Library("inr_kernels", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an op that chooses its backend inside its implementation, which is the same for every device."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"inr_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.inr_kernels, name)


def register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Registers the op's autograd formula."""
    torch.library.register_autograd(f"inr_kernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def forbid_second_derivative(name: str) -> None:
    """Makes a derivative of the op's backward raise: torch would only warn, and return a wrong one."""

    def refuse(ctx, *_):
        raise RuntimeError(f"{name}'s kernels do not support second derivatives; use backend='reference'")

    torch.library.register_autograd(f"inr_kernels::{name}_backward", refuse, lib=LIBRARY)


def only_needed(gradients: Iterable[Any], needs: Iterable[bool]) -> tuple[Any, ...]:
    """The gradients, with None for those that are not needed."""
    return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))


def schema_results(gradients: Iterable[Any], like: torch.Tensor) -> tuple[Any, ...]:
    """Gradients, or lists of them, as a schema returns them: contiguous, an empty tensor in place of None."""
    return tuple(
        list(schema_results(g, like))
        if isinstance(g, (list, tuple))
        else like.new_empty(0)
        if g is None
        else g.contiguous()
        for g in gradients
    )


def fake_gradients(
    tensors: Sequence[torch.Tensor], needs: Sequence[bool], like: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What `schema_results` returns for the gradients of these tensors, without values."""
    pairs = zip(tensors, needs, strict=True)
    return tuple(t.new_empty(t.shape) if needed else like.new_empty(0) for t, needed in pairs)
