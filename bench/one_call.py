"""`python -m bench.one_call OP`: an op's first call, forward and backward; on a GPU, of each of its GPU backends.

Prints how long it takes from the import to the result: with an empty TRITON_CACHE_DIR, compiling included. With --small
every kernel of the op runs, on a few pixels: what compute-sanitizer is to look at.
"""

import time

BEGIN = time.perf_counter()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import itertools  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402

import torch  # noqa: E402

import inr_kernels  # noqa: E402
from inr_kernels._core.dispatch import OPS  # noqa: E402

IMPORTED = time.perf_counter()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def local_implicit(small):
    """LIIF's decoder; small: with the ensemble first, too, layer by layer (float32) or on chip (float16), there also
    with more than 128 channels, which Hopper has a kernel for.
    """
    side, queries = (5, 70) if small else (256, 1 << 20)
    narrow, half, single = (32, 32), torch.float16, torch.float32
    forms = [(half, narrow), (single, narrow), (half, (32, 130))] if small else [(torch.bfloat16, (256,) * 4)]
    cell = torch.full((1, 2), 1 / side, device=DEVICE)
    for (dtype, hidden), after in itertools.product(forms, ("last", "first") if small else ("last",)):
        decoder = inr_kernels.LocalImplicitDecoder(64, hidden=hidden, ensemble_after=after).to(DEVICE, dtype)
        feat, coord = random(1, 64, side, side), random(1, queries, 2).detach().tanh()
        yield lambda: decoder(feat.to(dtype), coord, cell), [feat, *decoder.parameters()]  # noqa: B023


def elementwise_filter(small):
    """DEAR's; small: with one softmax over all, too."""
    batch, channels, *sides = (1, 4, 9, 11) if small else (1, 256, 64, 64)
    form = {"kernel_size": 3, "padding": "reflect", "alpha": 2.0, "gamma": -1.0}
    for normalize in ("taps", "all") if small else ("taps",):
        leaves = random(batch, channels, *sides), random(batch, 9 * channels, *sides)
        yield partial(inr_kernels.elementwise_filter, *leaves, normalize=normalize, **form), leaves


def unmask_attention(small):
    """DEAR's; small: with masked keys, too."""
    batch, channels, *sides = (2, 20, 9, 11) if small else (1, 64, 64, 64)
    for mask_keys in (False, True) if small else (False,):
        feat, mask = random(batch, channels, *sides), (random(batch, 1, *sides) > 0).float()
        yield partial(inr_kernels.unmask_attention, feat, mask, mask_keys=mask_keys), [feat]


def neighborhood_attention(small):
    """IN²'s: packed, with a bias."""
    size, heads, dim, kernel = ((7, 19), 2, 8, 3) if small else ((64, 64), 8, 32, 7)
    qkv, rpb = random(1, *size, 3, heads, dim), random(heads, 2 * kernel - 1, 2 * kernel - 1)
    yield partial(inr_kernels.neighborhood_attention_2d_packed, qkv, kernel, rpb=rpb), [qkv, rpb]


def fourier_unit(small):
    """LaMa's, on a map that is transformed by products."""
    channels, side = (6, 9) if small else (192, 64)
    unit, x = inr_kernels.FourierUnit(channels, channels).to(DEVICE), random(1, channels, side, side)
    yield partial(unit, x), [x, *unit.parameters()]


CALLS = [local_implicit, elementwise_filter, unmask_attention, neighborhood_attention, fourier_unit]
CALLS = {call.__name__: call for call in CALLS}


def kernels(op):
    """The op's GPU backends; on a CPU its default."""
    return [name for name in OPS[op].backends if name not in ("cpu", "reference")] if DEVICE == "cuda" else [None]


def times(op, small, backend):
    """The seconds of the op's first call and of its gradients, in words."""
    marks = []
    with inr_kernels.backend(backend) if backend else contextlib.nullcontext():
        for run, leaves in CALLS[op](small):
            begin = time.perf_counter()
            try:
                out = run()
            except RuntimeError as error:
                if "cannot run" not in str(error):
                    raise
                print(error)
                continue
            assert out.isfinite().all()  # waits for it
            middle = time.perf_counter()
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().square().sum(), leaves))
            marks.append((middle - begin, time.perf_counter() - middle))
    if not marks:
        sys.exit(f"{backend} takes none of these calls")
    return "first result {:.2f} s, gradients {:.2f} s".format(*marks[0])


def main():
    """Prints a line of times for each backend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("op", choices=CALLS)
    parser.add_argument("--small", action="store_true", help="all kernels, on a few pixels")
    parser.add_argument("--backend", help="this one alone")
    args = parser.parse_args()
    torch.ones(1, device=DEVICE).item()
    start = f"import {IMPORTED - BEGIN:.2f} s, device {time.perf_counter() - IMPORTED:.2f} s"
    for backend in [args.backend] if args.backend else kernels(args.op):
        print(f"{args.op} ({backend or 'default'} on {DEVICE}): {start}, {times(args.op, args.small, backend)}")


if __name__ == "__main__":
    main()
