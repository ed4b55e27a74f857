"""The command `inr-kernels export`."""

from argparse import Namespace

from inr_kernels.models import DEAR, IN2, LIIF, Network, export_onnx, from_checkpoint

from .parsing import UsageError
from .pictures import check_other_file

NETWORKS: dict[str, type[Network]] = {"liif": LIIF, "dear": DEAR, "in2": IN2}


def run(args: Namespace) -> None:
    """Opens the network and writes it as an ONNX file."""
    if args.output == "-":
        raise UsageError("argument -o/--output: must be the name of a file; got -")
    check_other_file(args.output, {"checkpoint": args.model})
    network = NETWORKS[args.model].pretrained() if args.model in NETWORKS else from_checkpoint(args.model)
    if args.size is None:
        export_onnx(network, args.output)
    else:
        export_onnx(network, args.output, dynamic=False, size=args.size)
