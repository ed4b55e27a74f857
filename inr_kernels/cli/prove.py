"""The command `inr-kernels prove`."""

import argparse
import sys
import warnings
from collections.abc import Iterable

from inr_kernels import prove
from inr_kernels._core import proof, verdicts
from inr_kernels._core.text import printable
from inr_kernels._core.verdicts import Verdict

from .parsing import UsageError


def run(args: argparse.Namespace) -> None:
    """Proves kernels and prints a table; or shows, or deletes, what is stored."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _run(args)
        finally:
            for warning in caught:
                print(f"inr-kernels: {printable(str(warning.message))}", file=sys.stderr)


def _run(args):
    keys = None
    if args.device is not None or not (args.list or args.forget):
        try:
            keys = [device.key for device in proof.select(args.device)]
        except RuntimeError:
            raise UsageError("PyTorch finds no GPU; --device cpu proves the kernels of this processor") from None
        except ValueError as error:
            raise UsageError(f"argument --{error}") from None

    def is_meant(key, verdict):
        fits = (keys is None or key in keys) and (not args.op or verdict.op in args.op)
        return fits and (not args.dtype or verdict.dtype in args.dtype)

    if args.forget:
        print(f"{verdicts.forget(is_meant)} verdicts deleted")
    elif args.list:
        stored = verdicts.stored()
        found = {key: [v for v in made if is_meant(key, v)] for key, made in stored.items()}
        for key, made in found.items():
            if made:
                print(f"{printable(key)}\n\n{table(made)}\n")
        print(f"File: {verdicts.file()}" if any(found.values()) else "no verdicts are stored")
    else:
        options = {"quick": args.quick, "missing": args.missing, "quiet": args.quiet}
        made = prove(args.op, dtype=args.dtype, device=args.device, **options)
        print(table(made) if made else "nothing to prove")
        on = sum(verdict.is_on() for verdict in made)
        print(f"\n{on} of {len(made)} on. File: {verdicts.file()}")
        if args.device == "cpu":
            print("On a CPU the C++ kernels are the default, with or without a verdict.")


def table(made: Iterable[Verdict]) -> str:
    """One line per verdict: times in milliseconds, how many times faster than plain PyTorch, and whether it is on."""
    rows = [["operator", "kernel", "dtype", "form", "forward", "backward", ""]]
    for verdict in made:
        pairs = list(zip(verdict.kernel, verdict.speedups, strict=True)) if verdict.kernel and verdict.speedups else []
        times = [f"{seconds * 1e3:.3g} ms {ratio:.1f}×" for seconds, ratio in pairs] or ["", ""]
        names = [verdict.op, verdict.backend, verdict.dtype, verdict.form]
        rows.append([*names, *times, printable(verdict.state)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(aligned)
