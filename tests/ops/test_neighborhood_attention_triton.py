"""neighborhood_attention in Triton, in its interpreter if there is no GPU; tests that need a GPU are marked.

An interpreted program takes a tenth of a second, so the problems are as small as possible.
"""

import pytest
import torch
from neighborhood_attention_cases import Case, assert_kernel_as_accurate

from inr_kernels import neighborhood_attention_2d
from inr_kernels.neighborhood_attention import triton_kernels
from inr_kernels.neighborhood_attention.arguments import Facts, exact

SMALL = {"batch": 1, "heads": 1, "size": (4, 9)}
CASES = {
    "plain": {"size": (5, 9)},
    "bias, two heads and images": {"bias": True, "heads": 2, "batch": 2, "size": (3, 4)},
    "K 1": {"kernel_size": 1, "size": (1, 1)},
    "even K": {"kernel_size": (4, 2)},
    "columns in two blocks": {"kernel_size": (1, 13), "size": (1, 19), "dim": 3},
    "dilation": {"kernel_size": 2, "dilation": (2, 3), "size": (5, 7), "bias": True},
    "stride": {"kernel_size": (3, 4), "stride": (2, 4), "dim": 1},
    "causal": {"is_causal": True, "kernel_size": (2, 3), "stride": (2, 1), "bias": True},
    "packed": {"layout": "packed", "dim": 19},
    "dim 70": {"dim": 70, "size": (3, 9)},
    "heads first": {"layout": "heads first", "scale": 0.0},
    "wide values, bias": {"dim": 5, "dim_v": 37, "bias": True, "size": (3, 9)},
    "values in blocks": {"dim_v": 260, "size": (3, 3)},
    "grouped heads": {"heads": 4, "shared": (2, 2), "size": (3, 4)},
    "shared keys and values": {"heads": 6, "shared": (2, 3), "size": (3, 4), "bias": True},
    "cross-scale": {"size": (6, 12), "key_size": (3, 4), "kernel_size": (2, 3), "bias": True},
    "cross-scale, dilation, causal": {
        **{"size": (8, 6), "key_size": (4, 6), "kernel_size": (2, 3), "dilation": (2, 1), "is_causal": True},
    },
    "all keys of any size": {"size": (1, 5), "key_size": (3, 2), "kernel_size": (3, 2)},
    "volume": {"size": (3, 4, 5), "kernel_size": (2, 3, 2), "bias": True},
    "volume, dilation, stride, causal": {
        **{"size": (5, 3, 4), "kernel_size": (3, 2, 2), "dilation": (1, 1, 2), "stride": (2, 1, 1)},
        "is_causal": (True, False, True),
    },
    "volume, shared heads": {"size": (2, 3, 4), "kernel_size": 2, "heads": 2, "shared": (1, 2), "dim_v": 260},
    "mean of heads": {"heads": 2, "shared": (2, 1), "mean_heads": True, "size": (3, 4)},
    "mean of heads, cross-scale, values in blocks": {
        **{
            "heads": 2,
            "shared": (1, 1),
            "mean_heads": True,
            "size": (4, 4),
            "key_size": (2, 2),
            "kernel_size": 2,
            "dim_v": 260,
        },
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_accurate_as_eager(dtype, name):
    assert_kernel_as_accurate(Case(**SMALL | CASES[name]), dtype, "triton")


@pytest.mark.parametrize("name", ["k7", "k3d2_odd", "even_k4", "stride", "causal"])
def test_equals_natten(golden, name):
    """One head of one image."""
    arrays = golden(f"natten_{name}")
    options = {key: arrays[key].tolist() for key in ("kernel_size", "dilation", "stride", "is_causal")}
    tensors = (arrays[key][:1, :, :, 1:] for key in "qkv")
    out, lse = neighborhood_attention_2d(*tensors, **options, return_lse=True, backend="triton")
    assert (out - arrays["out"][:1, :, :, 1:]).abs().max() <= 1e-6
    assert (lse - arrays["lse"][:1, :, :, 1:]).abs().max() <= 2e-6


def test_equals_natten_with_bias(golden):
    arrays = golden("natten_rpb_k3")
    leaves = [arrays[key][:, :, :, 1:].requires_grad_() for key in ("q", "k", "v")]
    rpb = arrays["rpb"][1:].requires_grad_()
    out = neighborhood_attention_2d(*leaves, 3, rpb=rpb, backend="triton")
    assert (out - arrays["out"][:, :, :, 1:]).abs().max() <= 2e-6
    *grads, d_rpb = torch.autograd.grad(out, [*leaves, rpb], arrays["grad_out"][:, :, :, 1:])
    for grad, key in zip(grads, "qkv", strict=True):
        expected = arrays[f"grad_{key}"][:, :, :, 1:]
        assert (grad - expected).abs().max() <= 1e-6 * expected.abs().max()
    expected = arrays["grad_rpb"][1:]
    assert (d_rpb - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_bias_gradient_in_parts_equals_that_of_tiles(monkeypatch):
    """For windows of more than 16 keys per axis it is not summed in registers."""
    case = Case(1, (6, 7), 1, 2, 2, bias=True)
    whole = case.run(torch.float32, "triton")
    monkeypatch.setattr(triton_kernels, "MOST_OFFSETS", 2)
    monkeypatch.setattr(triton_kernels, "QUERIES", 16)
    monkeypatch.setattr(triton_kernels, "CHANNELS", 128)
    for one, other in zip(case.run(torch.float32, "triton"), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_bias_gradient_has_the_same_bits():
    case = Case(1, (5, 9), 1, 2, 3, bias=True)
    assert all(map(torch.equal, case.run(torch.float16, "triton"), case.run(torch.float16, "triton")))


@pytest.mark.parametrize("needed", range(4))
def test_only_needed_gradients(needed):
    case = Case(1, (2, 3), 1, 2, 2, bias=True)
    tensors = [t.float() for t in (*case.tensors[0].unbind(3), case.tensors[1])]
    leaves = [t.clone().requires_grad_(i == needed) for i, t in enumerate(tensors)]
    grads = []
    for backend in ("triton", "reference"):
        out = neighborhood_attention_2d(*leaves[:3], 2, rpb=leaves[3], backend=backend)
        grads += torch.autograd.grad(out.square().sum(), leaves[needed])
    torch.testing.assert_close(*grads)


def test_why_not():
    facts = [Facts(torch.device("cpu"), dtype) for dtype in (torch.float64, torch.bfloat16)]
    assert "float64" in triton_kernels.why_not(facts[0])
    assert "bfloat16" in triton_kernels.why_not(facts[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, 9])
def test_paper_shape_on_a_gpu(dilation, dtype):
    qkv = torch.randn(2, 64, 64, 3, 8, 32, device="cuda").to(dtype)
    rpb = torch.randn(8, 13, 13, device="cuda")
    runs = []
    for dtype_, backend in ((dtype, "triton"), (dtype, "reference"), (torch.float64, "reference")):
        leaves = [t.to(dtype_).requires_grad_() for t in qkv.unbind(3)]
        bias = rpb.to(exact(dtype_)).requires_grad_()
        out = neighborhood_attention_2d(*leaves, 7, dilation=dilation, rpb=bias, backend=backend)
        runs.append([out, *torch.autograd.grad(out.sum(), [*leaves, bias])])
    for ours, theirs, truth in zip(*runs, strict=True):
        allowed = 2 * (theirs - truth).norm() + 2e-3 * truth.norm()
        assert (ours - truth).norm() <= allowed


@pytest.mark.gpu
def test_cuda_graph():
    qkv = torch.randn(1, 20, 24, 3, 4, 32, device="cuda", dtype=torch.float16)
    step = lambda: neighborhood_attention_2d(*qkv.unbind(3), 7, backend="triton")  # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [step() for _ in range(3)][-1]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
