"""local_implicit in Triton, in its interpreter if there is no GPU; tests that need a GPU are marked."""

import pytest
import torch
from local_implicit_cases import CASES, Case, assert_as_accurate, assert_kernel_as_accurate

from inr_kernels import LocalImplicitDecoder, local_implicit_decode
from inr_kernels.local_implicit import op, reference, triton_kernels


@pytest.fixture(params=["fused", "layered"])
def path(request, monkeypatch):
    """Whether the hidden state stays in registers, in any dtype."""
    monkeypatch.setattr(triton_kernels, "fused", lambda *_: request.param == "fused")


@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_eager_float32(case, path):
    assert_kernel_as_accurate(Case(**CASES[case]), torch.float32, "triton")


@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_eager_float16(case):
    assert_kernel_as_accurate(Case(**CASES[case], relu_margin=True), torch.float16, "triton")


@pytest.mark.parametrize("name", ["liif_u1e1c1", "liif_u0e0c0"])
def test_equals_liif(golden, name):
    arrays = golden(name)
    depth = sum(key.startswith("state.") and key.endswith(".weight") for key in arrays)
    weights, biases = (
        [arrays[f"state.imnet.layers.{2 * i}.{kind}"].requires_grad_() for i in range(depth)]
        for kind in ("weight", "bias")
    )
    unfold, ensemble, with_cell = map(bool, arrays["flags"])
    feat, cell = arrays["feat"].requires_grad_(), arrays["cell"] if with_cell else None
    out = local_implicit_decode(
        feat, arrays["coord"], cell, weights, biases,
        feat_unfold=unfold, local_ensemble=ensemble, backend="triton",
    )  # fmt: skip
    assert (out - arrays["out"]).abs().max() <= 2e-6 * arrays["out"].abs().max()
    grads = torch.autograd.grad(out, [feat, *weights, *biases], arrays["grad_out"])
    names = [f"grad.layers.{2 * i}.{kind}" for kind in ("weight", "bias") for i in range(depth)]
    for grad, name in zip(grads, ["grad_feat", *names], strict=True):
        assert (grad - arrays[name]).abs().max() <= 1e-5 * arrays[name].abs().max()


def test_pixel_centres_are_the_reference_table():
    for n in [*range(1, 200), 333, 720, 1356, 4001]:
        first, step = -1 + 2 / (2 * n), 2 * (2 / (2 * n))
        index = torch.arange(n).float()
        table = torch.tensor(first) + torch.tensor(step) * index
        assert torch.equal(table, reference.pixel_centres(n))


def test_runs_of_queries_equal_one_run(monkeypatch):
    """A workspace too small for all queries changes only the order of summation."""
    case = Case(queries=150, hidden=(16, 16), feat_unfold=False)
    whole = case.decode(torch.float32, "triton", True)
    monkeypatch.setattr(triton_kernels, "WORKSPACE", 1)
    for one, other in zip(whole, case.decode(torch.float32, "triton", True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_render_in_bands(path):
    decoder = LocalImplicitDecoder(3, hidden=(16, 16))
    feat = torch.randn(1, 3, 9, 5)
    with torch.no_grad():
        truth = decoder.render(feat, (20, 11), backend="reference")
        bands = decoder.render(feat, (20, 11), backend="triton", workspace=40_000)
    assert (bands - truth).abs().max() <= 2e-6 * truth.abs().max()


def test_nan_coordinates(path):
    case = Case(batch=1, hidden=(16, 16))
    case.tensors["coord"][0, 3, 0] = float("nan")
    case.tensors["coord"][0, 5, 1] = float("inf")
    out = case.decode(torch.float32, "triton")[0][0]
    assert out[[3, 5]].isnan().all()
    assert out.isfinite().all(1).sum() == len(out) - 2


@pytest.mark.parametrize("after", ["last", "first"])
def test_deterministic(after):
    case = Case(size=(2, 3), hidden=(16, 16), ensemble_after=after)
    first, second = (case.decode(torch.float32, "triton", True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_why_not():
    facts = [op.Facts(torch.device("cpu"), dtype, (8, 8, 3)) for dtype in (torch.float64, torch.bfloat16)]
    assert "float64" in triton_kernels.why_not(facts[0])
    assert "bfloat16" in triton_kernels.why_not(facts[1])


def on_gpu(case, dtype):
    """Output and gradients of kernel, eager and float64, computed on the GPU."""
    case.tensors = {
        key: [v.cuda() for v in value] if isinstance(value, list) else value if value is None else value.cuda()
        for key, value in case.tensors.items()
    }
    case.decode(dtype, "triton")

    def results(dtype_, backend):
        feat, coord, cell, weights, biases = case.cast(dtype)
        leaves = [t.to(dtype_).requires_grad_() for t in (feat, *weights, *biases)]
        n = len(weights)
        out = local_implicit_decode(
            leaves[0], coord, cell, leaves[1 : 1 + n], leaves[1 + n :],
            ensemble_after=case.ensemble_after, backend=backend,
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    return results(dtype, "triton"), results(dtype, "reference"), results(torch.float64, "reference")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("after", ["last", "first"])
def test_paper_shape_on_a_gpu(after, dtype):
    case = Case(channels=64, hidden=(256,) * 4, size=(48, 48), queries=2304, ensemble_after=after)
    kernel, eager, truth = on_gpu(case, dtype)
    assert_as_accurate(kernel[:1], eager[:1], truth[:1])
    for ours, theirs, exact in zip(kernel[1:], eager[1:], truth[1:], strict=True):
        allowed = 2 * (theirs - exact).norm() + 0.02 * exact.norm()  # rounding flips ReLUs at random
        assert (ours - exact).norm() <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(dtype):
    decoder = LocalImplicitDecoder(8, hidden=(64, 64)).to("cuda", dtype)
    feat = torch.randn(2, 8, 9, 10, device="cuda", dtype=dtype, requires_grad=True)
    coord, cell = torch.rand(2, 500, 2, device="cuda") * 2 - 1, torch.rand(2, 2, device="cuda") / 9

    def step():
        out = decoder(feat, coord, cell, backend="triton")
        return out, *torch.autograd.grad(out.sum(), [feat, *decoder.parameters()])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [step() for _ in range(3)][-1]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))
