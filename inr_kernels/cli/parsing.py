"""Parses values on the command line; errors are one line."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

from inr_kernels._core.text import printable

Number = TypeVar("Number", int, float)


class UsageError(ValueError):
    """A mistake on the command line that argparse cannot detect; exit status 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints errors in one line, without the usage."""

    def _print_message(self, message, file=None):
        """As argparse, which would ignore that the standard output cannot be written."""
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"inr-kernels: {printable(message)}\n")
        raise AssertionError  # exit does not return


def positive(
    kind: type[Number], *, or_zero: bool = False, least: float = 0, most: float = math.inf
) -> Callable[[str], Number]:
    """Returns a parser of finite positive numbers of that type, from `least` to `most`, and of 0 if `or_zero`."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
            valid = math.isfinite(value) and (value > 0 or (or_zero and value == 0))
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            rule = "0 or a positive" if or_zero else "a positive"
            noun = "integer" if kind is int else "finite number"
            raise argparse.ArgumentTypeError(f"must be {rule} {noun}; got {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}; got {text}")
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {text}")
        return value

    return parse


def size(text: str) -> tuple[int, int]:
    """Parses "WIDTHxHEIGHT" to (height, width), the order of a tensor's sides."""
    try:
        width, height = map(positive(int), text.lower().split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        rule = "must be WIDTHxHEIGHT, two positive integers such as 1920x1080"
        raise argparse.ArgumentTypeError(f"{rule}; got {text}") from None
    return height, width


def scales(text: str) -> list[float]:
    """Parses "2,3.7" to numbers above 1."""
    found = [positive(float)(part) for part in text.split(",")]
    if min(found) <= 1:
        raise argparse.ArgumentTypeError(f"must be more than 1; got {min(found):g}")
    return found


def name_suffix(text: str) -> str:
    """Parses what is added to a file's name."""
    if "/" in text or os.sep in text or text.startswith("."):
        raise argparse.ArgumentTypeError(
            f"must be a part of a name, e.g. _large; got {text} (--format sets the format)"
        )
    return text


def device(text: str) -> int | str:
    """Parses a GPU's number, or "cpu"."""
    if text == "cpu":
        return text
    try:
        return positive(int, or_zero=True)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be a GPU's number, such as 0, or cpu; got {text}") from None


def megabytes(text: str) -> int:
    """Parses a number of megabytes (2^20 bytes) to bytes."""
    return positive(int)(text) << 20


def gigabytes(text: str) -> float:
    """Parses a number of gigabytes (10^9 bytes, as in messages) to bytes."""
    return positive(float)(text) * 1e9


def model(command: str, networks: Mapping[str, Sequence[str]]) -> Callable[[str], str]:
    """Returns a parser of --model: the name of a network that ships, in any case, or the path of a checkpoint.

    Args:
        command: that has the option.
        networks: the names that each command takes.
    """

    def parse(text: str) -> str:
        if text.lower() in networks[command]:
            return text.lower()
        if os.path.exists(text) or os.path.basename(text) != text or os.path.splitext(text)[1]:
            return text
        names = " or ".join((", ".join(networks[command]), "the path of a checkpoint"))
        others = [f"inr-kernels {other}" for other in networks if text.lower() in networks[other]]
        hint = f" ({others[0]} takes it)" if others else ""
        if text.lower() == "lama" and "dear" in networks[command]:
            hint = " (the weights of LaMa are not part of this package: give their file, such as big-lama.pt)"
        raise argparse.ArgumentTypeError(f"must be {names}; got {text}{hint}")

    return parse
