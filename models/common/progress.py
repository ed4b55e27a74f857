"""Progress of long computations: `progress(done, total)` is called from time to time, the last time with done = total.

done and total count work in an arbitrary unit, so done grows about evenly with time.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

from inr_kernels import LocalImplicitDecoder

# Fused decoders do about this many multiplications in the time that an encoder takes for one (measured on a CPU).
FUSED = 2.5

Report: TypeAlias = Callable[[float, float], object]
Progress: TypeAlias = Report | None


def shares(progress: Report, *work: float) -> list[Report]:
    """Splits a progress callback among phases that follow each other.

    Args:
        progress: of the whole.
        work: of each phase, e.g. in multiplications.

    Returns:
        A callback for each phase.
    """

    def share(before: float, own: float) -> Report:
        return lambda done, total: progress(before + own * (done / total), sum(work))

    return [share(before, own) for before, own in zip(itertools.accumulate(work, initial=0), work, strict=False)]


@contextmanager
def reporting(list_modules: Callable[[], Sequence[tuple[nn.Module, float]]], progress: Progress) -> Iterator[None]:
    """In the block, reports each module of `list_modules()`, with its work, when it has run; each must run once."""
    if progress is None:  # most calls: the modules are not even listed
        yield
        return
    modules = list_modules()
    total, done = sum(work for _, work in modules), 0.0

    def report(work: float) -> None:
        nonlocal done
        done += work
        progress(done, total)

    hooks = [module.register_forward_hook(lambda *_, work=work: report(work)) for module, work in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def parameters(*modules: nn.Module) -> int:
    """The number of parameters; a convolution's is about its multiplications for a pixel of its output."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def multiplications(decoder: LocalImplicitDecoder) -> int:
    """The cost of a pixel of `decoder.render`, as the number of an encoder's multiplications that take as long.

    Each of the four neighbours passes the MLP, without the first layer, which runs at the input's size.
    """
    layers: Any = decoder.imnet.layers
    return round(4 * parameters(*layers[1:]) / FUSED)
