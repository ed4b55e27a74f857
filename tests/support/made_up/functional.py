"""The op "made_up": 2 x, and backends of it that fail in all the ways that a kernel can."""

import ctypes
import importlib
import itertools
import sys
import time

import torch

from inr_kernels._core.dispatch import Backend, Op, always, call_facts

FASTER, REFERENCE, SLOWER = 0.0, 0.002, 0.01  # seconds
_CALLS = itertools.count()


class Double(torch.autograd.Function):
    """2 x in at least some seconds; its gradient, too."""

    @staticmethod
    def forward(ctx, x, seconds, backward_seconds, factor):
        ctx.seconds, ctx.factor = backward_seconds, factor
        time.sleep(seconds)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return ctx.factor * grad, None, None, None


def double(x, seconds=FASTER, backward_seconds=None, factor=2):
    return Double.apply(x, seconds, seconds if backward_seconds is None else backward_seconds, factor)


def wrong(x):
    return double(x) + 1e-3


def nan(x):
    return double(x).index_fill(0, torch.tensor([1]), float("nan"))


def unwritten(x):
    out = double(x)
    return out + torch.where(torch.arange(len(x)) == 1, torch.empty_like(x), 0)


def once_in_two(x):
    return double(x) + 1e-3 * (next(_CALLS) % 2)


def segfault(x):
    return ctypes.string_at(0)


def hang(x):
    time.sleep(1000)


def megabytes(x):
    for stream in (sys.stdout, sys.stderr):
        stream.write("a line\n" * (1 << 18))
        stream.flush()
    return double(x)


def memory(x):
    raise torch.OutOfMemoryError("4 PB")


def raising(x):
    return importlib.import_module("made_up.raises_at_import")


def why_not_raising(facts):
    raise RuntimeError("at import")


FORWARDS = {
    "right": double,
    "slow": lambda x: double(x, SLOWER),
    "slow backward": lambda x: double(x, FASTER, SLOWER),
    "wrong": wrong,
    "wrong gradient": lambda x: double(x, factor=2.002),
    "nan": nan,
    "unwritten": unwritten,
    "once in two": once_in_two,
    "segfault": segfault,
    "megabytes": megabytes,
    "memory": memory,
    "raising": raising,
    "hang": hang,
}
OP = Op("made_up", None, {"reference": Backend(always, lambda x: double(x, REFERENCE))})
OP.backends |= {name: Backend(always, forward) for name, forward in FORWARDS.items()}
OP.backends["raising at import"] = Backend(why_not_raising, double)
OP.backends["other device"] = Backend(lambda facts: "it is for another device", double)
OP.backends["for comparison"] = Backend(always, double, is_proven=False)


def made_up(x, *, backend=None):
    """2 x."""
    return OP.choose(backend, OP.facts(x)).forward(x)


OP.function, OP.facts = made_up, call_facts
