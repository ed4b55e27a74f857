"""Names of older releases that still work, with a DeprecationWarning."""

import sys
import warnings
from importlib import import_module


def eager_or_reference(eager: bool, reference: bool | None) -> bool:
    """Returns `eager`, or the value of `reference`, the keyword's former name."""
    if reference is None:
        return eager
    warnings.warn("reference= was renamed to eager=", DeprecationWarning, stacklevel=3)
    return reference


def moved(module: str, old: str, new: str) -> None:
    """Makes the module `old` an alias of `new`; run as a program, it calls `new`'s main.

    Args:
        module: the `__name__` of the calling module.
        old, new: full names.
    """
    target, is_program = import_module(new), module == "__main__"
    warnings.warn(f"{old} was moved to {new}", DeprecationWarning, stacklevel=2 if is_program else 3)
    if is_program:
        target.main()
    else:
        sys.modules[module] = target
