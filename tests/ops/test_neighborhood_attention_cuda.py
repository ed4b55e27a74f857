"""Tests neighborhood_attention's CUDA kernels in an emulation on the host; tests that need a GPU are marked."""

from dataclasses import replace
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from neighborhood_attention_cases import Case, assert_forward_as_accurate, assert_kernel_as_accurate

from inr_kernels import neighborhood_attention_2d
from inr_kernels._core import backends, native
from inr_kernels._core.dispatch import always
from inr_kernels._core.proof.problems import of_op
from inr_kernels.neighborhood_attention import op
from inr_kernels.neighborhood_attention.arguments import Facts

pytestmark = pytest.mark.slow  # compiles the emulation
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SMALL = {"batch": 1, "size": (9, 11)}
CASES = {
    "one pixel": {"size": (1, 1), "kernel_size": 1, "bias": True},
    "one row": {"size": (1, 40), "kernel_size": (1, 7)},
    "one column": {"size": (40, 1), "kernel_size": (7, 1)},
    "whole tiles": {"size": (8, 16), "kernel_size": 7, "dim": 32, "bias": True},
    "primes": {"size": (11, 13), "kernel_size": 5, "batch": 2, "heads": 3, "dim": 19, "bias": True},
    "even K": {"kernel_size": (4, 6), "dim": 16},
    "windows of all keys": {"size": (9, 11), "kernel_size": (9, 11), "heads": 1, "bias": True},
    "K 16": {"size": (16, 17), "kernel_size": 16, "heads": 1, "dim": 32, "bias": True},
    "K 17": {"size": (5, 30), "kernel_size": (3, 17), "heads": 1, "dim": 32, "bias": True},
    "several stages": {"size": (21, 9), "kernel_size": (12, 3), "heads": 1, "dim": 32, "bias": True},
    "dim 1": {"dim": 1},
    "dim 40": {"dim": 40},
    "dim 64": {"dim": 64, "kernel_size": 7, "heads": 1, "bias": True},
    "dim 72": {"dim": 72, "heads": 1},
    "dim 128": {"dim": 128, "kernel_size": (7, 3), "heads": 1, "bias": True},
    "dilation 2 x 3": {"dilation": (2, 3), "size": (9, 23), "bias": True},
    "dilation 9": {"dilation": 9, "kernel_size": 2, "size": (19, 22), "heads": 1},
    "stride 2": {"kernel_size": 5, "stride": 2, "bias": True},
    "stride K": {"kernel_size": (3, 6), "stride": (3, 6)},
    "causal": {"is_causal": True, "kernel_size": 5, "bias": True},
    "causal rows": {"is_causal": (True, False), "kernel_size": 4, "stride": 2, "dilation": 2},
    "causal columns": {"is_causal": (False, True), "kernel_size": (3, 7), "stride": (1, 4)},
    "negative scale": {"scale": -0.3},
    "scale 0": {"scale": 0.0, "bias": True},
    "heads first": {"layout": "heads first", "dim": 32},
    "dim first": {"layout": "dim first", "dim": 5},
    "packed": {"layout": "packed", "kernel_size": 5, "dim": 32, "bias": True},
    "packed, misaligned": {"layout": "packed", "dim": 12},
}


@pytest.fixture(scope="module")
def library(built_once):
    return emulated_cuda.load(built_once("emulated_cuda", emulated_cuda.build))


@pytest.fixture
def on_host(library, monkeypatch):
    """Makes backend="cuda" run on CPU tensors in the emulation; on_host(library) uses another build of it."""

    def use(library=library):
        monkeypatch.setitem(op.OP.backends, "cuda", replace(op.cuda_backend(), why_not=always))
        monkeypatch.setattr(native, "load", lambda: (emulated_cuda.Native(library), ""))

    emulated_cuda.guard_memory(monkeypatch)
    use()
    return use


@HALVES
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_eager(case, dtype, on_host):
    """The outputs, and all gradients where the backward is not Triton's."""
    case = Case(**SMALL | CASES[case])
    is_triton = case.dim > 64 or (case.bias and max(case.tensors[1].shape) > 31)
    (assert_forward_as_accurate if is_triton else assert_kernel_as_accurate)(case, dtype, "cuda")


@HALVES
@pytest.mark.parametrize("name", ["k7", "k3d2_odd", "even_k4", "stride", "causal"])
def test_equals_natten(name, dtype, golden, on_host):
    """Two roundings of the values, whose weights sum to one."""
    arrays = golden(f"natten_{name}")
    options = {key: arrays[key].tolist() for key in ("kernel_size", "dilation", "stride", "is_causal")}
    tensors = [arrays[key].to(dtype) for key in "qkv"]
    out, lse = neighborhood_attention_2d(*tensors, **options, return_lse=True, backend="cuda")
    rounded = [t.double() for t in tensors]
    truth, exact = neighborhood_attention_2d(*rounded, **options, return_lse=True, backend="reference")
    assert (out - truth).abs().max() <= torch.finfo(dtype).eps * arrays["v"].abs().max()
    assert (lse - exact).abs().max() <= 2e-6
    assert (lse - arrays["lse"]).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("needed", range(4))
def test_each_needed_gradient_alone(needed, on_host):
    """Of query, key, value and rpb; the same bits as with all of them."""
    case = Case(**SMALL, kernel_size=3, bias=True, dim=32, dilation=(1, 3))
    out, lse, inputs = case.forward(torch.float16, "cuda", rounded=torch.float16)
    every = torch.autograd.grad((out.sum(), lse.sum()), inputs)
    inputs = [t.detach().requires_grad_(i == needed) for i, t in enumerate(inputs)]
    *qkv, rpb = inputs
    out, lse = neighborhood_attention_2d(*qkv, 3, rpb=rpb, **case.options(), return_lse=True, backend="cuda")
    (alone,) = torch.autograd.grad((out.sum(), lse.sum()), [inputs[needed]])
    assert torch.equal(alone, every[needed])


@pytest.mark.parametrize(("dim", "kernel_size"), [(72, 3), (8, (1, 17))])
def test_the_backward_of_wide_heads_and_biases_is_tritons(dim, kernel_size, on_host, monkeypatch):
    called = []
    monkeypatch.setattr(op, "_TRITON", replace(op._TRITON, backward=lambda *args, **needs: called.append(needs)))
    case = Case(batch=1, size=(3, 20), dim=dim, kernel_size=kernel_size, bias=True)
    qkv, rpb = [t.half() for t in case.separate()], case.tensors[1].float()
    kernel = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    a = op.Arguments(qkv, rpb, kernel, (1, 1), (1, 1), (0, 0), 1.0, False)
    out, lse = op.cuda_backend().forward(a)
    op.cuda_backend().backward(out, lse, lse, a, needs=[True] * 4)
    assert called == [{"needs": [True] * 4}]


@HALVES
def test_extreme_scores(dtype, on_host):
    """Differences of thousands between scores: the largest one's value is the result, without NaN."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 6, 9, 2, 32, generator=generator).to(dtype) for _ in range(3))
    tensors = 40 * query, 40 * key, value
    out, lse = neighborhood_attention_2d(*tensors, 5, return_lse=True, backend="cuda")
    truth, exact = neighborhood_attention_2d(*(t.double() for t in tensors), 5, return_lse=True, backend="reference")
    assert (out - truth).abs().max() <= 2 * torch.finfo(dtype).eps * value.abs().max()
    assert (lse - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_nan_in_a_key_reaches_its_windows_only_as_far_as_a_tile(on_host):
    """A NaN or an infinity spreads to the pixels of the tiles that load it, like in Triton."""
    qkv = torch.randn(3, 1, 20, 30, 1, 32, dtype=torch.float16)
    qkv[1, 0, 2, 3] = float("nan")
    out = neighborhood_attention_2d(*qkv, 3, backend="cuda")
    is_nan = out.isnan().any(-1)[0, :, :, 0]
    assert is_nan[1:4, 2:5].all()
    assert not is_nan[9:].any() and not is_nan[:, 9:].any()


def test_an_empty_output(on_host):
    query = torch.empty(0, 5, 6, 2, 8, dtype=torch.float16)
    assert neighborhood_attention_2d(query, query, query, 3, backend="cuda").shape == query.shape


def test_misaligned_tokens(on_host):
    """The first token is two bytes after an aligned address."""
    memory = torch.randn(1 + 3 * 6 * 9 * 32).bfloat16()
    tokens = memory[1:].view(3, 1, 6, 9, 1, 32)
    assert tokens.data_ptr() % 16 == 2
    moved = neighborhood_attention_2d(*tokens, 3, backend="cuda")
    assert torch.equal(moved, neighborhood_attention_2d(*tokens.clone(), 3, backend="cuda"))


def test_launches(on_host, library, monkeypatch):
    """A block for every tile, class and head, on the given stream, with no more than the default shared memory."""
    monkeypatch.setattr(backends, "stream", lambda device: 0x5EED)
    found = {}
    for dim, kernel_size, dilation in ((32, 7, 1), (32, 3, 1), (64, 7, 1), (128, 7, 1), (32, 7, 2)):
        query = torch.zeros(2, 17, 24, 3, dim, dtype=torch.float16)
        emulated_cuda.launches(library)
        neighborhood_attention_2d(query, query, query, kernel_size, dilation=dilation, backend="cuda")
        (launch,) = emulated_cuda.launches(library)
        assert (launch.stream, launch.threads, launch.cluster) == (0x5EED, 128, 1)
        found[dim, kernel_size, dilation] = launch.blocks, launch.shared
    blocks, stage = 2 * 3 * 3 * 3, 32 << 10
    assert found == {
        (32, 7, 1): (blocks, 14 * 16 * 32 * 4),
        (32, 3, 1): (blocks, 10 * 16 * 32 * 4),
        (64, 7, 1): (blocks, stage),
        (128, 7, 1): (blocks, stage),
        (32, 7, 2): (2 * 3 * (2 * 2) * (2 * 2), 14 * 16 * 32 * 4),
    }


def test_launches_of_the_backward(on_host, library):
    """Two launches of the forward's grid, with more shared memory for the sums of the bias gradient."""
    case = Case(batch=2, size=(17, 24), heads=3, dim=32, kernel_size=7, bias=True)
    emulated_cuda.launches(library)
    case.run(torch.float16, "cuda")
    forward, query, keys = emulated_cuda.launches(library)
    assert {launch.blocks for launch in (forward, query, keys)} == {2 * 3 * 3 * 3}
    assert query.shared == forward.shared + 4 * 4 * (13 * 13 + 16 * 18)
    assert keys.shared == 16 * 16 * (2 * 64 + 8)


@HALVES
@pytest.mark.parametrize("case", ["whole tiles", "dim 64"])
def test_the_rounding_of_tensor_cores_is_within_the_documented_error(case, dtype, on_host, library):
    """Sums that are truncated, of products that are cut off: see machine.h."""
    library.set_truncating(True)
    try:
        assert_kernel_as_accurate(Case(**SMALL | CASES[case]), dtype, "cuda")
    finally:
        library.set_truncating(False)


# Faults that the emulation must detect: a file, the text to replace, its replacement, and the expected error; no error
# means that the results must be wrong.
KERNEL, HEADER = "neighborhood_attention.cu", "neighborhood_attention.cuh"
BACKWARD = "neighborhood_attention_backward.cu"
FAULTS = {
    "no barrier": (KERNEL, "__syncthreads();\n\n", "\n", ""),
    "no wait": (KERNEL, "wait_for_copies<0>();", "wait_for_copies<1>();", "ends with pending copies"),
    "missing lane": (HEADER, "mma<type>(sums[n], left", "if (lane) mma<type>(sums[n], left", "deadlock|collective"),
    "beyond the stage": (HEADER, "return token * (D / 8)", "return (token + 48) * (D / 8)", "outside shared memory"),
    "halves swapped": (HEADER, "left, b[2], b[3]", "left, b[3], b[2]", ""),
    "window": (HEADER, "leader - a.kernel / 2", "leader - (a.kernel - 1) / 2", ""),
    "no barrier of the sums": (BACKWARD, "__syncthreads();  // the sums", "// the sums", ""),
    "diagonals read too early": (BACKWARD, "__syncwarp();\n    const int diagonal", "const int diagonal", ""),
    "queries of keys": (BACKWARD, ".begin <= last) ++r.end", ".begin < last) ++r.end", ""),
    "empty tiles": (BACKWARD, "b.shares[share + i] = 0", "b.shares[share + i] = 1", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_detects(fault, on_host, tmp_path, built_once, if_changed):
    *replacement, error = FAULTS[fault]

    def run(_):
        built = built_once("emulated_cuda", emulated_cuda.build)
        on_host(emulated_cuda.build_with_fault(tmp_path, built, *replacement))
        case = Case(batch=1, size=(13, 17), kernel_size=(4, 6), dilation=(1, 2), bias=True, dim=16)
        with pytest.raises(RuntimeError if error else AssertionError, match=error or None):
            assert_kernel_as_accurate(case, torch.float16, "cuda")

    if_changed(run, {"emulation": emulated_cuda.files("neighborhood_attention")})


def test_several_blocks_in_flight_detect_memory_that_they_share(on_host, tmp_path, built_once, if_changed):
    """The sums of the bias gradient in one array: right where a block begins after another has ended."""

    def run(_):
        built = built_once("emulated_cuda", emulated_cuda.build)
        own = "float* of_bias = reinterpret_cast<float*>(values + stage_size);"
        shared = "static float one_array[1 << 14]; float* of_bias = one_array;"
        library = emulated_cuda.build_with_fault(tmp_path, built, BACKWARD, own, shared)
        on_host(library)
        case = Case(batch=1, size=(9, 17), heads=1, dim=16, bias=True)
        library.set_order(0)
        assert_kernel_as_accurate(case, torch.float16, "cuda")
        library.set_order(1)
        with pytest.raises(AssertionError):
            assert_kernel_as_accurate(case, torch.float16, "cuda")

    if_changed(run, {"emulation": emulated_cuda.files("neighborhood_attention")})


GPU = Facts(torch.device("cuda"), torch.bfloat16, dim=32, heads=(8, 8, 8))
REASONS = {
    "a CPU": (replace(GPU, device=torch.device("cpu")), "it takes CUDA tensors; these are on cpu"),
    "float32": (replace(GPU, dtype=torch.float32), "it takes bfloat16 and float16; got float32"),
    "a volume": (replace(GPU, rank=3), "it takes two dimensions; got 3"),
    "cross-scale": (replace(GPU, is_cross_scale=True), "it takes keys and values of the queries' size and heads"),
    "grouped heads": (replace(GPU, heads=(8, 2, 2)), "it takes keys and values of the queries' size and heads"),
    "a mean": (replace(GPU, heads=(8, 8, 1), mean_heads=True), "without a mean of the heads"),
    "wide values": (replace(GPU, value_dim=96), "it takes values of the queries' 32 channels; got 96"),
    "wide heads": (replace(GPU, dim=129), "it takes at most 128 channels; got 129"),
}


@pytest.mark.parametrize("case", [*REASONS, "none"])
def test_reason_why_cuda_cannot_run(case, monkeypatch):
    facts, reason = REASONS.get(case, (replace(GPU, dim=128, value_dim=128, rpb=True), ""))
    library = SimpleNamespace(cuda_archs="80", cuda_version="13.0")
    monkeypatch.setattr(native, "load", lambda: (library, ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    found = op.why_not_cuda(facts)
    assert reason in found and bool(found) == bool(reason)


def test_a_form_runs_as_a_whole(monkeypatch):
    """A proof tries all problems of a form: the backend takes either all or none of them."""
    library = SimpleNamespace(cuda_archs="80", cuda_version="13.0")
    monkeypatch.setattr(native, "load", lambda: (library, ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    taken = {}
    for problem in of_op(op.OP, large=True):
        arguments, options = problem.build(torch.device("meta"))
        facts = replace(op.OP.facts(*arguments, **options), device=GPU.device, dtype=GPU.dtype)
        taken.setdefault(facts.form, set()).add(op.why_not_cuda(facts) == "")
    assert {len(answers) for answers in taken.values()} == {1}
    assert {True} in taken.values() and {False} in taken.values()


def test_a_launch_without_a_gpu_raises():
    if torch.cuda.is_available() or not native.load()[0].cuda_archs:
        return  # the launch would succeed, or does not exist
    query, lse = torch.zeros(1, 5, 6, 2, 8, dtype=torch.float16), torch.zeros(1, 5, 6, 2)
    arguments = op.Arguments([query] * 3, None, (3, 3), (1, 1), (1, 1), (0, 0), 1.0, False)
    with pytest.raises(RuntimeError, match="CUDA: "):
        op.cuda_backend().forward(arguments)
    with pytest.raises(RuntimeError, match="CUDA: "):
        op.cuda_backend().backward(query, lse, lse, arguments, needs=[True, True, True, False])


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, dtype):
    case = Case(**SMALL | CASES[case])
    case.tensors = tuple(None if t is None else t.cuda() for t in case.tensors)
    assert_kernel_as_accurate(case, dtype, "cuda")


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("dilation", [1, 2, 9])
def test_paper_shape_on_a_gpu(dilation, dtype):
    case = Case(size=(64, 64), heads=8, dim=32, kernel_size=7, dilation=dilation, bias=True, layout="packed")
    case.tensors = tuple(t.cuda() for t in case.tensors)
    assert_kernel_as_accurate(case, dtype, "cuda")
    first, second = (case.run(dtype, "cuda") for _ in range(2))
    assert all(map(torch.equal, first, second))
