"""Enlarge pictures and fill their holes, show what this machine runs, or compare speed and quality in a demo.

Exit status: 0 on success, 2 for a mistake on the command line, 1 for any other error; stderr then has one line with the
reason.
"""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from . import demo, info, inpaint, upscale
from .parsing import Parser, UsageError

COMMANDS = (upscale, inpaint, info, demo)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line, by default this process's; raises SystemExit on errors."""
    parser = Parser(
        prog="inr-kernels",
        description=(__doc__ or "").split("\n")[0],
        epilog="`inr-kernels COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"inr-kernels {version('inr-kernels')}")
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND")
    for command in COMMANDS:
        about = command.__doc__ or ""
        sub = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=about.split("\n")[0],
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        with _exit_on_signals():
            args.run(args)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, "inr-kernels: interrupted\n")
    except (OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        parser.exit(1, f"inr-kernels: {_one_line(error)}\n")


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in the block, so that temporary files are removed.

    Only a process's main thread can set handlers; in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number)) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        return name + error.strerror
    return " ".join(str(error).split()) or type(error).__name__
