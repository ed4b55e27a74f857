"""Tests local_implicit's CUDA kernels in an emulation on the host; tests that need a GPU are marked."""

from dataclasses import replace
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from local_implicit_cases import FLAGS, Case, assert_as_accurate

from inr_kernels import LocalImplicitDecoder, local_implicit_decode
from inr_kernels._core import backends, devices, native
from inr_kernels._core.dispatch import always
from inr_kernels.local_implicit import op

pytestmark = pytest.mark.slow  # compiles the emulation
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
AFTER = pytest.mark.parametrize("after", ["last", "first"])
CASES = {
    "one query": {"batch": 1, "queries": 1},
    "a block and one": {"batch": 1, "queries": 33, "hidden": (16,)},
    "primes": {"batch": 3, "queries": 97, "size": (11, 5), "hidden": (16, 16)},
    "grid": {"grid": (12, 15), "size": (4, 5), "batch": 1, "hidden": (16, 16)},
    "one pixel": {"size": (1, 1)},
    "one column": {"size": (9, 1)},
    "far outside": {"spread": 4.0},
    "shallow": {"hidden": (24,), "out": 9},
    "odd widths": {"hidden": (37, 1, 70), "out": 1},
    "wide output": {"hidden": (16, 16), "out": 70},
    "narrow": {"hidden": (8, 8, 8, 8, 8)},
    "full": {"hidden": (128, 128), "queries": 7},
    "wide": {"hidden": (256, 256), "batch": 1},
    "wide, once": {"hidden": (256,), "batch": 1, "out": 70},
    "wide and odd": {"hidden": (129, 40, 255), "batch": 1, "out": 9},
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


def assert_forward_as_accurate(case, dtype):
    truth = case.decode(torch.float64, "reference", rounded=dtype)
    assert_as_accurate(case.decode(dtype, "cuda"), case.decode(dtype, "reference"), truth)


@HALVES
@AFTER
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_eager(case, after, dtype, on_host):
    assert_forward_as_accurate(Case(**CASES[case], ensemble_after=after), dtype)


@HALVES
@pytest.mark.parametrize("case", ["wide", "wide, once", "wide and odd"])
@pytest.mark.parametrize("ensemble", [True, False])
def test_two_tiles_per_warp(ensemble, case, dtype, on_host, library):
    """The variant for GPUs where a block may use 160 KB of shared memory."""
    case = Case(**CASES[case] | {"queries": 67 if ensemble else 259}, local_ensemble=ensemble)
    one = case.decode(dtype, "cuda")[0]
    library.set_shared_limit(160 << 10)
    try:
        two = case.decode(dtype, "cuda")[0]
        assert_forward_as_accurate(case, dtype)
    finally:
        library.set_shared_limit(99 << 10)
    assert torch.equal(one, two)


@AFTER
@pytest.mark.parametrize(("unfold", "ensemble", "cell"), FLAGS)
def test_flags(unfold, ensemble, cell, after, on_host):
    flags = {"feat_unfold": unfold, "local_ensemble": ensemble, "cell_decode": cell, "ensemble_after": after}
    assert_forward_as_accurate(Case(**flags, hidden=(20, 16)), torch.bfloat16)


@HALVES
@pytest.mark.parametrize("name", ["liif_u1e1c1", "liif_x3", "liif_full256"])
def test_equals_liif(name, dtype, golden, on_host):
    arrays = golden(name)
    depth = sum(key.startswith("state.") and key.endswith(".weight") for key in arrays)
    names = [f"state.imnet.layers.{2 * i}" for i in range(depth)]
    some = slice(0, 40)
    feat, coord, cell = arrays["feat"].to(dtype), arrays["coord"][:, some], arrays["cell"][:, some]
    weights, biases = ([arrays[f"{n}.{kind}"].to(dtype) for n in names] for kind in ("weight", "bias"))
    truth = arrays["out"][:, some]
    kernel, eager = (
        local_implicit_decode(feat, coord, cell, weights, biases, backend=b) for b in ("cuda", "reference")
    )
    assert_as_accurate([kernel], [eager], [truth.double()])


@HALVES
def test_neighbours_and_weights_equal_the_reference(dtype, on_host):
    """At these scales a single fused multiply-add would change a neighbour or a weight."""
    case = Case(batch=1, size=(7, 13), grid=(31, 17), hidden=(8,), feat_unfold=False, cell_decode=False)
    hoisted = torch.randn(1, 7, 13, 8).relu().to(dtype)
    y, x = (t.unsqueeze(1) for t in case.tensors["coord"].unbind(-1))
    eye, none = torch.eye(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    args = [hoisted, y, x, None, torch.zeros(8, 2, dtype=dtype), [eye], [none], 7, 0, True, True]
    kernel, eager = (op.local_implicit(*args, backend) for backend in ("cuda", "reference"))
    assert torch.equal(kernel, eager)


@AFTER
def test_strided_planes_and_a_misaligned_map(after, on_host):
    case = Case(hidden=(16, 16), ensemble_after=after, grid=(5, 6))
    _, coord, _, weights, biases = case.cast(torch.bfloat16)
    first = after == "first"
    args = [weights[0][:, -2 if first else -4 :], weights[1:], biases[1:], 6, 0, True, first, "cuda"]
    hoisted = torch.randn(2 * 6 * 7 * 16 + 1).bfloat16()[1:].view(2, 6, 7, 16)
    planes = [*coord.view(2, 5, 6, 2).unbind(-1), (torch.rand(2, 1, 1, 2) / 5).expand(2, 5, 6, 2)]
    assert hoisted.is_contiguous() and hoisted.data_ptr() % 16 == 2
    plain = [t.contiguous().clone() for t in (hoisted, *planes)]
    columns_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in planes]
    results = [op.local_implicit(*views, *args) for views in (plain, [hoisted, *planes], [hoisted, *columns_first])]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@AFTER
def test_render_in_bands(after, on_host):
    decoder = LocalImplicitDecoder(3, hidden=(16, 16), ensemble_after=after).bfloat16()
    feat = torch.randn(1, 3, 9, 5).bfloat16()
    with torch.no_grad():
        whole = decoder.render(feat, (20, 11), backend="cuda")
        bands = decoder.render(feat, (20, 11), backend="cuda", workspace=40_000)
        eager = decoder.render(feat, (20, 11), backend="reference")
    assert torch.equal(whole, bands)
    assert (whole - eager).abs().max() <= 0.02 * eager.abs().max()


@AFTER
def test_nan_coordinates(after, on_host):
    case = Case(batch=1, hidden=(16, 16), ensemble_after=after)
    case.tensors["coord"][0, 3, 0] = float("nan")
    case.tensors["coord"][0, 5, 1] = float("inf")
    out = case.decode(torch.bfloat16, "cuda")[0][0]
    assert out[[3, 5]].isnan().all()
    assert out.isfinite().all(1).sum() == len(out) - 2


def test_nan_features_propagate_to_their_queries(on_host):
    case = Case(batch=1, hidden=(16, 16), feat_unfold=False)
    case.tensors["feat"][0, 2, 1, 1] = float("nan")
    kernel, eager = (case.decode(torch.float16, backend)[0] for backend in ("cuda", "reference"))
    assert 0 < kernel.isnan().sum() < kernel.numel()
    assert torch.equal(kernel.isnan(), eager.isnan())


def test_launches(on_host, library, monkeypatch):
    """The weights' kernel and the decoder, on the given stream; two tiles of rows a warp where shared memory allows."""
    monkeypatch.setattr(backends, "stream", lambda device: 0x5EED)
    case, found = Case(batch=1, queries=130, hidden=(256, 256)), {}
    for limit in (99 << 10, 160 << 10):
        library.set_shared_limit(limit)
        emulated_cuda.launches(library)
        case.decode(torch.float16, "cuda")
        _, decoder = launches = emulated_cuda.launches(library)
        assert {launch.stream for launch in launches} == {0x5EED}
        assert {launch.cluster for launch in launches} == {1} and {launch.threads for launch in launches} == {256}
        found[limit] = decoder.blocks, decoder.shared
    library.set_shared_limit(99 << 10)
    assert found == {99 << 10: (-(-4 * 130 // 128), 48 << 10), 160 << 10: (-(-4 * 130 // 256), 160 << 10)}


@HALVES
@pytest.mark.parametrize("case", ["wide", "wide and odd"])
def test_the_rounding_of_tensor_cores_is_within_the_documented_error(case, dtype, on_host, library):
    """Sums that are truncated, of products that are cut off: see machine.h."""
    case = Case(**CASES[case])
    rounded_to_nearest = case.decode(dtype, "cuda")[0]
    library.set_truncating(True)
    try:
        assert_forward_as_accurate(case, dtype)
        unchanged = torch.equal(case.decode(dtype, "cuda")[0], rounded_to_nearest)
        assert not unchanged or dtype == torch.bfloat16  # its own rounding may hide the difference
    finally:
        library.set_truncating(False)


def test_an_empty_output(on_host):
    case = Case(queries=0)
    assert case.decode(torch.float16, "cuda")[0].shape == (2, 0, 3)


# Faults that the emulation must detect: a file, the text to replace, its replacement, and the expected error; no error
# means that the results must be wrong.
FAULTS = {
    "no barrier": ("local_implicit.cu", "__syncthreads();", "", ""),
    "wait too short": ("local_implicit.cu", "copies<slots - 2>", "copies<slots - 1>", "ends with pending copies"),
    "missing lane": (
        "local_implicit.cu",
        "mma<type>(sum[m][n], ",
        "if (lane) mma<type>(sum[m][n], ",
        "deadlock",
    ),
    "halves swapped": ("local_implicit_layers.cuh", "2 * k + 1], b.z, b.w", "2 * k + 1], b.w, b.z", ""),
    "channels swapped": ("local_implicit.cuh", "tile % 4 * 2", "(tile + 1) % 4 * 2", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_detects(fault, on_host, tmp_path, built_once, if_changed):
    *replacement, error = FAULTS[fault]

    def run(_):
        built = built_once("emulated_cuda", emulated_cuda.build)
        on_host(emulated_cuda.build_with_fault(tmp_path, built, *replacement))
        case = Case(batch=1, hidden=(64, 64), out=40)
        if error:
            with pytest.raises(RuntimeError, match=error):
                case.decode(torch.bfloat16, "cuda")
        else:
            with pytest.raises(AssertionError):
                assert_forward_as_accurate(case, torch.bfloat16)

    if_changed(run, {"emulation": emulated_cuda.files("local_implicit")})


GPU = op.Facts(torch.device("cuda"), torch.bfloat16, (256, 256, 3))
REASONS = {
    "a CPU": (replace(GPU, device=torch.device("cpu")), "80", (8, 0), "it takes CUDA tensors; these are on cpu"),
    "float32": (replace(GPU, dtype=torch.float32), "80", (8, 0), "it takes bfloat16 and float16; got float32"),
    "no nvcc": (GPU, "", (8, 0), "built without CUDA"),
    "too old": (GPU, "80,86", (7, 5), "compiled for sm_80, 86; this GPU has 7.5"),
    "an older minor": (GPU, "86", (8, 0), "this GPU has 8.0"),
    "another major": (GPU, "80,90,120", (10, 0), "this GPU has 10.0"),
    "too wide": (replace(GPU, widths=(64, 257, 3)), "80", (8, 0), "at most 256 channels before the last; got 257"),
    "too deep": (replace(GPU, widths=(8,) * 66), "80", (8, 0), "at most 64 layers after the first; got 65"),
}


def _library(archs):
    return SimpleNamespace(cuda_archs=archs, cuda_version="13.0", max_depth=64)


@pytest.mark.parametrize("case", REASONS)
def test_reason_why_cuda_cannot_run(case, monkeypatch):
    facts, archs, capability, reason = REASONS[case]
    monkeypatch.setattr(native, "load", lambda: (_library(archs), ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reason in op.why_not_cuda(facts)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (9, 0), (10, 3), (12, 1)])
def test_runs_on_later_gpus_of_the_same_major_version(capability, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (_library("80,86,89,90,100,120"), ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert op.why_not_cuda(GPU) == ""
    assert op.why_not_cuda(replace(GPU, widths=(8, 8, 300))) == ""  # the last layer may be wider


@pytest.mark.parametrize(
    ("driver", "reason"), [((13, 2), ""), ((14, 0), ""), (None, ""), ((12, 8), "supports CUDA 12.8")]
)
def test_an_older_driver_than_the_compiler(driver, reason, monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (_library("80"), ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(devices, "cuda_of_driver", lambda: driver)
    found = op.why_not_cuda(GPU)
    assert reason in found and bool(found) == bool(reason)


def test_a_launch_without_a_gpu_raises():
    library = native.load()[0]
    if torch.cuda.is_available() or not library.cuda_archs:
        return  # the launch would succeed, or does not exist
    case = Case(batch=1, hidden=(8,))
    hoisted, (y, x) = torch.zeros(1, 6, 7, 8).half(), torch.zeros(2, 1, 1, 3)
    weight, bias = torch.zeros(3, 8).half(), torch.zeros(3).half()
    arguments = hoisted, y, x, None, torch.zeros(8, 2).half(), [weight], [bias], *case.size, True, False
    problem = op._Native(op.Arguments(*arguments))
    with pytest.raises(RuntimeError, match="CUDA: "):
        problem.forward_cuda(torch.empty(1, 1, 3, 3).half(), wgmma=False)


def on_gpu(case):
    """Moves the case's tensors to the GPU."""
    case.tensors = {
        key: [v.cuda() for v in value] if isinstance(value, list) else value if value is None else value.cuda()
        for key, value in case.tensors.items()
    }
    return case


@pytest.mark.gpu
@HALVES
@AFTER
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case, after, dtype):
    assert_forward_as_accurate(on_gpu(Case(**CASES[case], ensemble_after=after)), dtype)


@pytest.mark.gpu
@HALVES
@AFTER
def test_paper_shape_on_a_gpu(after, dtype):
    case = on_gpu(Case(channels=64, hidden=(256,) * 4, size=(48, 48), queries=30_000, ensemble_after=after))
    assert_forward_as_accurate(case, dtype)
    first, second = (case.decode(dtype, "cuda")[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@HALVES
def test_gradients_on_a_gpu_equal_triton(dtype):
    case = on_gpu(Case(hidden=(64, 64)))
    _, *ours = case.decode(dtype, "cuda", gradients=True)
    _, *triton = case.decode(dtype, "triton", gradients=True)
    assert all(map(torch.equal, ours, triton))


@pytest.mark.gpu
def test_cuda_graph_on_a_gpu():
    decoder = LocalImplicitDecoder(8, hidden=(64, 64)).to("cuda", torch.bfloat16)
    feat = torch.randn(2, 8, 9, 10, device="cuda", dtype=torch.bfloat16)
    coord, cell = torch.rand(2, 500, 2, device="cuda") * 2 - 1, torch.rand(2, 2, device="cuda") / 9
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        expected = [decoder(feat, coord, cell, backend="cuda") for _ in range(3)][-1]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = decoder(feat, coord, cell, backend="cuda")
    graph.replay()
    torch.cuda.synchronize()
    close = {"rtol": 0, "atol": 0.01}  # cuDNN may choose another convolution kernel
    torch.testing.assert_close(captured, expected, **close)
    feat.neg_()
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(captured, decoder(feat, coord, cell, backend="cuda"), **close)


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck_on_a_gpu(gradients):
    hoisted, (y, x) = torch.randn(2, 6, 7, 16).cuda().half(), (torch.rand(2, 2, 1, 33).cuda() * 2 - 1)
    position, weight, bias = torch.randn(16, 2).cuda().half(), torch.randn(3, 16).cuda().half(), torch.zeros(3).cuda()
    leaves = [t.requires_grad_(gradients) for t in (hoisted, position, weight, bias.half())]
    args = (leaves[0], y, x, None, leaves[1], [leaves[2]], [leaves[3]], 6, 0, True, False, "cuda")
    torch.library.opcheck(torch.ops.inr_kernels.local_implicit.default, args)
