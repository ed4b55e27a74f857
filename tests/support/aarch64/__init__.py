"""Runs the C++ kernels for aarch64 in qemu, for the ops' tests: `make aarch64`.

build.sh cross-compiles inr_kernels._C. remote.py, a pytest plugin, sends each call of it, with the memory that the
call's addresses point into, to serve.py in a Python for aarch64; what the kernel wrote comes back.
"""

from typing import Any, NamedTuple


class Pointer(NamedTuple):
    """An address: an offset into one of the call's pieces of memory."""

    memory: int
    offset: int


class Call(NamedTuple):
    """A call of a function of _C, or of a method of an object.

    Attributes:
        name: the function, or the class.
        arguments: the function's, or the constructor's.
        method: of the class; None: a function is called.
        method_arguments: positional and keyword arguments.
        memory: the address and the contents of each piece.
    """

    name: str
    arguments: dict[str, Any]
    method: str | None
    method_arguments: tuple[list[Any], dict[str, Any]]
    memory: list[tuple[int, bytes]]


def replace(value, how):
    """The value, with each number that it contains replaced by how(number)."""
    if isinstance(value, dict):
        return {key: replace(inner, how) for key, inner in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, Pointer):
        return [replace(inner, how) for inner in value]
    return how(value)
