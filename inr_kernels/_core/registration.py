"""The library `torch.ops.inr_kernels`; every op defines its schemas in it."""

import torch

LIBRARY = torch.library.Library("inr_kernels", "DEF")


def define(schema, implementation, fake):
    """Adds an op whose implementation chooses its backend itself, the same on every device."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"inr_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.inr_kernels, name)


def forbid_second_derivative(name):
    """Makes a derivative through the op's backward raise: torch alone would warn, and return a wrong one."""

    def refuse(ctx, *_):
        raise RuntimeError(f"{name}'s kernels have no second derivative; backend='reference' has every one")

    torch.library.register_autograd(f"inr_kernels::{name}_backward", refuse, lib=LIBRARY)
