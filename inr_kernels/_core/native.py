"""The compiled module `inr_kernels._C`, or the reason why there is none."""

import functools


@functools.cache
def load():
    """`(module, "")`, or `(None, reason)` where the extension does not import."""
    try:
        from inr_kernels import _C
    except ImportError as error:
        return None, f"inr_kernels._C does not import ({error}); build it with `pip install -e .`"
    return _C, ""


load()  # at once, as the library has to hear of every fork
