"""`python -m bench.one_call OP` times the first call of an op, forward and backward; on a GPU on each GPU backend.

Prints the time from the import to the result: with an empty TRITON_CACHE_DIR, compilation included. With --small every
kernel of the op runs on a few pixels, for compute-sanitizer.
"""

import time

BEGIN = time.perf_counter()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402

import inr_kernels  # noqa: E402
from inr_kernels._core.dispatch import OPS  # noqa: E402

IMPORTED = time.perf_counter()

from . import op_modules  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gpu_backends(op):
    """Returns the op's GPU backends; on a CPU None, the default."""
    return [name for name in OPS[op].backends if name not in ("cpu", "reference")] if DEVICE == "cuda" else [None]


def times(op, small, backend):
    """Returns the seconds of the op's first call and of its gradients, as text."""
    marks = []
    with inr_kernels.backend(backend) if backend else contextlib.nullcontext():
        for run, leaves in op_modules()[op].first_calls(small):
            begin = time.perf_counter()
            try:
                out = run()
            except RuntimeError as error:
                if "cannot run" not in str(error):
                    raise
                print(error)
                continue
            assert out.isfinite().all()  # synchronizes
            middle = time.perf_counter()
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().square().sum(), leaves))
            marks.append((middle - begin, time.perf_counter() - middle))
    if not marks:
        sys.exit(f"{backend} can run none of these calls")
    return "first result {:.2f} s, gradients {:.2f} s".format(*marks[0])


def main():
    """Prints a line of times for each backend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("op", choices=op_modules())
    parser.add_argument("--small", action="store_true", help="run all kernels of the op, on a few pixels")
    parser.add_argument("--backend", help="run only this backend")
    args = parser.parse_args()
    begin = time.perf_counter()
    torch.ones(1, device=DEVICE).item()
    start = f"import {IMPORTED - BEGIN:.2f} s, device {time.perf_counter() - begin:.2f} s"
    for backend in [args.backend] if args.backend else gpu_backends(args.op):
        print(f"{args.op} ({backend or 'default'} on {DEVICE}): {start}, {times(args.op, args.small, backend)}")


if __name__ == "__main__":
    main()
