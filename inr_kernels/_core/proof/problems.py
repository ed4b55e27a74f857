"""The calls that a proof tries: each op lists them in `inr_kernels/<op>/problems.py`.

That module has a function per op, of the op's name, that takes whether problems shall be as large as those of real
networks (for a GPU), and yields `Problem`s. The first of each form (`Facts.form`) is the one that is timed, and the
first of all is the most important.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from inr_kernels._core.dispatch import OPS, Facts, Op


class Problem(NamedTuple):
    """A call of an op's public function.

    Args:
        name: what is special about it, in words.
        build: takes a device, returns the arguments and options of the call, but for `backend`. The float64 tensors in
            it get the dtype under test, and gradients; other tensors stay as they are.
        function: the public function, if it is not the op's first.
    """

    name: str
    build: Callable[[torch.device], tuple[tuple[Any, ...], dict[str, Any]]]
    function: Callable[..., Any] | None = None


def of_op(op: Op, large: bool) -> Iterator[Problem]:
    """All problems of an op. large: of the size of real networks', for a GPU."""
    package = op.function.__module__.partition(".functional")[0]
    yield from getattr(importlib.import_module(f"{package}.problems"), op.name)(large)


def forms(op: Op, device: torch.device, large: bool) -> dict[str, tuple[Facts, list[Problem]]]:
    """The problems of an op by their form, with the facts of the first; its dtype is float64."""
    found: dict[str, tuple[Facts, list[Problem]]] = {}
    for problem in of_op(op, large):
        arguments, options = problem.build(torch.device("meta"))  # shapes without values
        facts = dataclasses.replace(op.facts(*arguments, **options), device=device)
        found.setdefault(facts.form, (facts, []))[1].append(problem)
    return found


def known_op(name: str) -> Op:
    """The op of that name; ValueError if there is none."""
    if name not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {name!r}")
    return OPS[name]
