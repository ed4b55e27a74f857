"""The command `inr-kernels export`."""

import os
from argparse import Namespace

from inr_kernels.models import Network, export_onnx

from .networks import open_network
from .pictures import say


def run(args: Namespace) -> None:
    """Opens the network and writes it as an ONNX file."""
    network = open_network(args.model, Network)
    say(args.output, f"exporting {network.NETWORK}, which takes up to some minutes")
    if args.size is None:
        export_onnx(network, args.output)
    else:
        export_onnx(network, args.output, dynamic=False, size=args.size)
    say(args.output, f"written, {os.path.getsize(args.output) / 1e6:.1f} MB")
