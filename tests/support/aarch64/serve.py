"""Runs calls of _C that arrive on the standard input. Needs Python's standard library and _C only."""

import ctypes
import pickle
import sys

import _C

from . import Pointer, replace


def place(address, contents):
    """A copy of the contents at an equally aligned address: (what owns it, its address)."""
    owner = ctypes.create_string_buffer(len(contents) + 64)
    start = ctypes.addressof(owner)
    start += (address - start) % 64
    ctypes.memmove(start, contents, len(contents))
    return owner, start


def run(call):
    """Runs a call; returns its result, or the exception that it raised, and the memory that it changed, by index."""
    placed = [place(*memory) for memory in call.memory]

    def resolved(arguments):
        return replace(arguments, lambda v: placed[v.memory][1] + v.offset if isinstance(v, Pointer) else v)

    try:
        target = getattr(_C, call.name)
        result = target(**resolved(call.arguments))
        if call.method:
            positional, keywords = resolved(call.method_arguments)
            result = getattr(result, call.method)(*positional, **keywords)
    except Exception as error:
        result = error
    after = [ctypes.string_at(start, len(before)) for (_, start), (_, before) in zip(placed, call.memory, strict=True)]
    return result, {i: new for i, new in enumerate(after) if new != call.memory[i][1]}


if __name__ == "__main__":
    while True:
        try:
            call = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(run(call), sys.stdout.buffer)
        sys.stdout.buffer.flush()
