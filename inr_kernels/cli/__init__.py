"""The command inr-kernels: upscale pictures, show the machine, run a demonstration.

Exit status: 0, 2 for a wrong command line, 1 for everything else; a line on stderr says why.
"""

import argparse
import signal
import sys
from importlib.metadata import version

from . import demo, info, upscale
from .parsing import Parser, UsageError


def main(argv=None):
    """Runs the command line, and exits with its status."""
    parser = Parser(prog="inr-kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"inr-kernels {version('inr-kernels')}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (upscale, info, demo):
        name = command.__name__.split(".")[-1]
        about = command.__doc__.split("\n")[0]
        sub = commands.add_parser(
            name,
            help=about,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    # As Ctrl-C does, so that a half-written file is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        args.run(args)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, "inr-kernels: interrupted\n")
    except (OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        parser.exit(1, f"inr-kernels: {_line(error)}\n")


def _line(error):
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        return name + error.strerror
    return " ".join(str(error).split()) or type(error).__name__
