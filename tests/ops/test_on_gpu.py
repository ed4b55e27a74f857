"""Every op on a GPU: all GPU backends against float64, over shapes, flags and dtypes, forward and backward; captured.

The problems are those of the CPU's tests; their tensors are made under `torch.device(DEVICE)`. Each is tried in one
dtype, the next problem in the next, and the first of an op in all: most of them compile every kernel anew.
"""

import importlib.util
import itertools

import elementwise_filter_cases as filters
import fourier_unit_cases as fourier
import local_implicit_cases as implicit
import neighborhood_attention_cases as neighborhood
import pytest
import torch
import torch.nn.functional as F
import unmask_attention_cases as unmask
from gpu_limits import unless_refused

import inr_kernels
from inr_kernels._core.dispatch import OPS
from inr_kernels.models import DEAR, IN2, DEARConfig, IN2Config, LaMa, LaMaConfig

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def implicit_problems():
    shapes = implicit.SHAPES | {name: shape for name, shape in implicit.CASES.items() if name not in implicit.SHAPES}
    for unfold, ensemble, cell in implicit.FLAGS:
        for after in ("last", "first"):
            flags = {"feat_unfold": unfold, "local_ensemble": ensemble, "cell_decode": cell, "ensemble_after": after}
            shapes[f"u{unfold:d}e{ensemble:d}c{cell:d}-{after}"] = flags
    yield "LIIF's decoder", {"hidden": (256,) * 4, "channels": 64, "queries": 500}
    yield from shapes.items()


def filter_problems():
    yield "DEAR's", {"channels": 64, "groups": 64, "size": (20, 33), "normalize": "taps", "coefficients": filters.DELTA}
    normalize = itertools.cycle(["none", "taps", "all"])
    for padding in ("zeros", "replicate", "reflect", "valid"):
        for kind in ("none", "taps", "all"):
            form = {"padding": padding, "normalize": kind, "window": kind != "none", "groups": 3}
            yield f"{padding}, {kind}", form | {"coefficients": (0.5, 0.25, 2.0)}
    for (name, shape), kind in zip(filters.SHAPES.items(), normalize, strict=False):
        padding = "zeros" if isinstance(shape.get("dilation"), tuple) else "reflect"
        yield name, shape | {"padding": padding, "normalize": kind, "coefficients": filters.LITERAL}


def unmask_problems():
    yield "DEAR's", {"shape": (2, 64, 32, 32)}
    for mask_keys, hole in itertools.product((False, True), unmask.HOLES):
        yield f"{hole}{', keys' if mask_keys else ''}", {"shape": (2, 33, 13, 17), "hole": hole, "mask_keys": mask_keys}
    for name, (batch, channels, *sides) in unmask.SHAPES.items():
        yield name, {"shape": (batch, min(channels, 64), *sides), "hole": "mixed"}


def neighborhood_problems():
    yield "IN²'s", {"size": (20, 33), "heads": 8, "dim": 32, "kernel_size": 7, "bias": True, "layout": "packed"}
    bias = itertools.cycle([False, True])
    yield from ((name, shape | {"bias": next(bias)}) for name, shape in neighborhood.SHAPES.items())


def fourier_problems():
    yield "LaMa's", {"channels": 192, "outputs": 192, "size": (64, 64)}
    training = itertools.cycle([False, True])
    yield "larger than products", {"size": (70, 66)}
    yield from ((name, shape | {"training": next(training)}) for name, shape in fourier.SHAPES.items())


def check_implicit(case, dtype, backend):
    case = case if dtype == torch.float32 else implicit.far_from_corners(case)
    implicit.assert_kernel_as_accurate(case, dtype, backend)


CHECKS = {
    "local_implicit": (implicit_problems, implicit.Case, check_implicit),
    "elementwise_filter": (filter_problems, filters.Case, filters.assert_kernel_as_accurate),
    "unmask_attention": (unmask_problems, unmask.Case, unmask.assert_as_accurate),
    "neighborhood_attention": (neighborhood_problems, neighborhood.Case, neighborhood.assert_kernel_as_accurate),
    "fourier_unit": (fourier_problems, fourier.Case, fourier.assert_as_accurate),
}
OTHERS = {"cpu", "reference"} | (set() if importlib.util.find_spec("natten") else {"natten"})
KERNELS = [(op, name) for op in CHECKS for name in OPS[op].backends if name not in OTHERS]


def problems():
    """Parameters: op, backend, dtype, the case's options."""
    for op, backend in KERNELS:
        for i, (name, options) in enumerate(CHECKS[op][0]()):
            for dtype in DTYPES if i == 0 else DTYPES[i % 3 :][:1]:
                short = str(dtype).removeprefix("torch.")
                yield pytest.param(op, backend, dtype, options, id=f"{op}-{backend}-{short}-{name}")


@pytest.mark.parametrize(("op", "backend", "dtype", "options"), list(problems()))
def test_as_accurate_as_eager(op, backend, dtype, options):
    _, make, check = CHECKS[op]
    with torch.device(DEVICE), unless_refused():
        check(make(**options), dtype, backend)


def run_of(op, case, dtype, backend):
    """A function without arguments: the op's output and gradients, always the same."""
    method = {"local_implicit": "decode", "elementwise_filter": "filter", "unmask_attention": "attend"}
    run = getattr(case, method.get(op, "run" if op == "fourier_unit" else "attend"))
    gradients = {"gradients": True} if op == "local_implicit" else {}
    return lambda: run(dtype, backend, **gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_the_same_bits_in_every_run(op, backend, dtype):
    problems, make, _ = CHECKS[op]
    with torch.device(DEVICE), unless_refused():
        run = run_of(op, make(**next(problems())[1]), dtype, backend)
        first = run()
        for _ in range(3):
            assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_large_map(dtype):
    """unmask_attention against the framework's own."""
    feat, mask = torch.randn(1, 64, 256, 256, device=DEVICE).to(dtype), unmask.mask_of("some", 1, 256, 256).to(DEVICE)
    tokens = feat.flatten(2).mT
    expected = F.scaled_dot_product_attention(((1 - mask.flatten(2).mT) * tokens).to(dtype), tokens, tokens)
    out = inr_kernels.unmask_attention(feat, mask, backend="triton").flatten(2).mT
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


MODELS = {
    "IN2": lambda: IN2(IN2Config(channels=(16, 16, 32), blocks=1, heads=4, hidden=(16, 16))),
    "DEAR": lambda: DEAR(DEARConfig(channels=32, features=16, blocks=1, filter_blocks=1, hidden=(32, 32))),
    "DEAR, smooth": lambda: DEAR(DEARConfig(channels=32, features=16, blocks=1, fill="smooth", hidden=(32, 32))),
    "LaMa": lambda: LaMa(LaMaConfig(features=8, blocks=1)),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_graphed(name, dtype):
    """Nothing waits for the GPU; a replay sees its own inputs and what the weights hold then, and allocates nothing
    but its result, which is the caller's own."""
    model = MODELS[name]().to(DEVICE, dtype).eval()
    sides = (56, 64) if name == "LaMa" else (57, 61)
    shapes = [(1, 4, *sides)] if name == "LaMa" else [(1, 3, *sides), (1, 1, *sides)]
    fast, kept = model.graphed(shapes[0]), []
    with torch.no_grad(), inr_kernels.backend("triton"):
        for _ in range(3):
            inputs = [(torch.rand(shape, device=DEVICE) < 0.7).to(dtype) for shape in shapes]
            kept.append((fast(*inputs), model(*inputs)))
            for parameter in model.parameters():
                parameter.mul_(1.01)
        close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.05}  # libraries may choose other kernels
        for out, expected in kept:
            torch.testing.assert_close(out, expected, **close)
        captured = fast._captured
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        fast(*inputs)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1
        assert fast._captured is captured
        model.to(torch.float64).to(dtype)
        torch.testing.assert_close(fast(*inputs), model(*inputs), **close)
        other = [torch.rand(2, *shape[1:], device=DEVICE).to(dtype) for shape in shapes]
        torch.testing.assert_close(fast(*other), model(*other), **close)
    if dtype == torch.float32:
        assert fast(*inputs).requires_grad
