"""Names of older releases that still work, with a DeprecationWarning."""

import sys
import warnings
from importlib import import_module


def deprecated(message: str) -> None:
    """Warns at the line of the caller: the first that belongs neither to this package nor to torch.

    Between a call of a module and its forward are frames of torch, whose number depends on its version and hooks.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("inr_kernels", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def eager_or_reference(eager: bool, reference: bool | None) -> bool:
    """Returns `eager`, or the value of `reference`, the keyword's former name."""
    if reference is None:
        return eager
    deprecated("reference= was renamed to eager=")
    return reference


def moved(module: str, old: str, new: str) -> None:
    """Makes the module `old` an alias of `new`.

    Args:
        module: the `__name__` of the calling module.
        old, new: full names.
    """
    target = import_module(new)
    warnings.warn(f"{old} was moved to {new}", DeprecationWarning, stacklevel=3)
    sys.modules[module] = target
