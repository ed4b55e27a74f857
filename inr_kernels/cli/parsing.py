"""Parses values on the command line; errors are one line."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn, TypeVar

Number = TypeVar("Number", int, float)


class UsageError(ValueError):
    """A mistake on the command line that argparse cannot detect; exit status 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"inr-kernels: {message}\n")
        raise AssertionError  # exit does not return


def positive(kind: type[Number]) -> Callable[[str], Number]:
    """Returns a parser of finite positive numbers of that type."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
            valid = math.isfinite(value) and value > 0
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            noun = "integer" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a finite positive {noun}; got {text}")
        return value

    return parse


def size(text: str) -> tuple[int, int]:
    """Parses "HEIGHTxWIDTH" to (height, width)."""
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH; got {text}")
    height, width = map(positive(int), parts)
    return height, width


def megabytes(text: str) -> int:
    """Parses a number of megabytes to bytes."""
    return positive(int)(text) << 20
