"""Values on the command line, and what is wrong with them, in one line."""

import argparse
import math


class UsageError(ValueError):
    """The command line asks for what makes no sense; exit status 2."""


class Parser(argparse.ArgumentParser):
    """An error is one line, without the usage above it."""

    def error(self, message):
        self.exit(2, f"inr-kernels: {message}\n")


def positive(kind):
    """A parser of finite positive numbers."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            noun = "integer" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a finite positive {noun}; got {text}")
        return value

    return parse


def size(text):
    """HxW -> (H, W)"""
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH; got {text}")
    return tuple(map(positive(int), parts))


def megabytes(text):
    """Megabytes -> bytes"""
    return positive(int)(text) << 20
