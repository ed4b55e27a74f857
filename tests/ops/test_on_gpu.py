"""Every op on a GPU: all GPU backends against float64, over shapes, flags and dtypes, forward and backward; captured.

The problems are `gpu_problems(dtype)` of the ops' case modules (tests/support); their tensors are created under
`torch.device(DEVICE)`. The first problem of an op is tried in every dtype, the others in one each, in turn, as most of
them compile all kernels again.
"""

import contextlib
import importlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F
import unmask_attention_cases
from compile_triton import TRITON_OPS
from gpu_limits import unless_refused

import inr_kernels
from inr_kernels._core.dispatch import OPS
from inr_kernels.models import DEAR, IN2, DEARConfig, IN2Config, LaMa, LaMaConfig

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

NOT_ON_GPU = {"cpu", "reference"} | (set() if importlib.util.find_spec("natten") else {"natten"})
CASES = {op: importlib.import_module(f"{op}_cases") for op in [*TRITON_OPS, "local_texture"]}
KERNELS = [(op, name) for op in CASES for name in OPS[op].backends if name not in NOT_ON_GPU]


def problems():
    """Parameters: op, backend, dtype, the case's options."""
    for op, backend in KERNELS:
        for remainder, dtype in enumerate(DTYPES):
            for i, (name, options) in enumerate(CASES[op].gpu_problems(dtype)):
                if i == 0 or i % len(DTYPES) == remainder:
                    short = str(dtype).removeprefix("torch.")
                    yield pytest.param(op, backend, dtype, options, id=f"{op}-{backend}-{short}-{name}")


@pytest.mark.parametrize(("op", "backend", "dtype", "options"), list(problems()))
def test_as_accurate_as_eager(op, backend, dtype, options):
    cases = CASES[op]
    with torch.device(DEVICE), unless_refused():
        cases.assert_kernel_as_accurate(cases.Case(**options), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_results_are_deterministic(op, backend, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # of the convolutions before a kernel
    _, options = next(CASES[op].gpu_problems(dtype))
    with torch.device(DEVICE), unless_refused():
        case = CASES[op].Case(**options)
        first = case.run(dtype, backend)
        for _ in range(3):
            assert all(map(torch.equal, first, case.run(dtype, backend)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_large_map_equals_torchs_attention(dtype):
    feat = torch.randn(1, 64, 256, 256, device=DEVICE).to(dtype)
    mask = unmask_attention_cases.mask_of("some", 1, 256, 256).to(DEVICE)
    tokens = feat.flatten(2).mT[:, None]  # without the axis of heads, torch stores all scores: 17 GB in float32
    known = 1 - mask.flatten(2).mT[:, None]
    expected = F.scaled_dot_product_attention((known * tokens).to(dtype), tokens, tokens)
    out = inr_kernels.unmask_attention(feat, mask, backend="triton").flatten(2).mT[:, None]
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


MODELS = {
    "IN2": lambda: IN2(IN2Config(channels=(16, 16, 32), blocks=1, heads=4, hidden=(16, 16))),
    "DEAR": lambda: DEAR(DEARConfig(channels=32, features=16, blocks=1, filter_blocks=1, hidden=(32, 32))),
    "DEAR, smooth": lambda: DEAR(DEARConfig(channels=32, features=16, blocks=1, fill="smooth", hidden=(32, 32))),
    "LaMa": lambda: LaMa(LaMaConfig(features=8, blocks=1)),
}


@pytest.mark.filterwarnings("ignore:.* (its slow PyTorch reference|plain PyTorch)")
@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_graphed_models(name, dtype, backend):
    """The forward can be captured. A replay uses its own inputs and the weights' values at that time, and allocates
    only its result, which the caller owns. Also on the default path."""
    model = MODELS[name]().to(DEVICE, dtype).eval()
    shapes = [(1, 3, 57, 61), (1, 1, 57, 61)]
    fast, kept = model.graphed(shapes[0]), []
    with torch.no_grad(), inr_kernels.backend(backend) if backend else contextlib.nullcontext():
        for _ in range(3):
            inputs = [(torch.rand(shape, device=DEVICE) < 0.7).to(dtype) for shape in shapes]
            kept.append((fast(*inputs), model(*inputs)))
            for parameter in model.parameters():
                parameter.mul_(1.01)
        close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.05}  # libraries may select other kernels
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
