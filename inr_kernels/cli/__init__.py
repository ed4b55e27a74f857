"""The command inr-kernels: `main` runs a command line.

Exit status: 0 on success, 2 for a mistake on the command line, 128 plus the signal's number after a signal, 1 for any
other error; stderr then has one line with the reason.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from inr_kernels._core.text import one_line


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line, by default this process's; raises SystemExit on errors.

    Only the modules of the command that runs are imported: `--help` and `--version` do without torch.
    """
    try:
        try:
            _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except OSError as error:
        sys.exit(_unwritable(error))


def _unwritable(error: OSError) -> int:
    """Handles text that could not be written to stdout; returns the exit status.

    A reader that stops early, as in `inr-kernels info | head -1`, is no error to report.
    """
    with contextlib.suppress(OSError, ValueError):  # else Python writes it once more when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    if sys.stderr is not None:
        print(f"inr-kernels: the standard output: {one_line(error)}", file=sys.stderr)
    return 1


def _interrupted() -> int:
    """Prints "interrupted" on stderr, if it is open; returns the exit status."""
    if sys.stderr is not None:
        print("inr-kernels: interrupted", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


def _run(argv: Sequence[str] | None) -> None:
    from importlib import import_module

    from . import names
    from .arguments import make_parser
    from .parsing import UsageError

    parser = make_parser()
    args, more = parser.parse_known_args(argv)
    if args.command == "train":  # argparse takes its key=value up to the next option only
        args.options += [text for text in more if not text.startswith("-")]
        more = [text for text in more if text.startswith("-")]
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if args.command is None:
        parser.print_help()
        return
    try:
        names.check(args)
        with _exit_while_importing():
            command = import_module(f".{args.command}", __name__)
        with _exit_on_signals():
            command.run(args)
    except UsageError as error:
        parser.error(str(error))
    except (OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:  # of print
            raise
        parser.exit(1, f"inr-kernels: {one_line(error)}\n")


@contextlib.contextmanager
def _exit_while_importing() -> Iterator[None]:
    """In the block, SIGINT ends the process at once, if torch is not imported yet.

    An exception would get lost in the initialization of torch's C++ modules. There is nothing to clean up yet.
    """
    in_main = threading.current_thread() is threading.main_thread()
    default = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or "torch" in sys.modules:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(_interrupted()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in the block, so that temporary files are removed.

    An ignored signal stays ignored, as `nohup` sets it, and a handler that was not set from Python stays. Only a
    process's main thread can set handlers; in another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
