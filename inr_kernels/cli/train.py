"""The command `train`."""

import argparse

from inr_kernels.models.training import config, loop


def run(args: argparse.Namespace) -> None:
    """Trains as the arguments of `inr-kernels train` say."""
    options = config.load(args.config, args.options)
    if args.print_config:
        print(config.to_yaml(options), end="")
        return
    try:
        path = loop.train(options, args.resume)
    except OSError as error:
        if error.filename is None:  # not of a file: of a process or a connection
            raise RuntimeError(str(error)) from error
        raise
    if path is not None:
        print(path)
