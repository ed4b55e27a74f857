"""Tests local_implicit's kernel for sm_90a in the emulation, which reads weights through wgmma's matrix descriptors."""

from dataclasses import replace
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from local_implicit_cases import FLAGS, Case, assert_as_accurate
from test_local_implicit_cuda import AFTER, CASES, HALVES, assert_forward_as_accurate, on_gpu

from inr_kernels import local_implicit_decode
from inr_kernels._core import backends, native
from inr_kernels._core.dispatch import always
from inr_kernels.local_implicit import op

pytestmark = pytest.mark.slow  # compiles the emulation


def use_kernel(monkeypatch, kernel, why_not=always):
    """Makes backend="cuda" run this kernel."""
    monkeypatch.setitem(op.OP.backends, "cuda", replace(op.cuda_backend(kernel), why_not=why_not))


@pytest.fixture(scope="module")
def library(built_once):
    return emulated_cuda.load(built_once("emulated_cuda", emulated_cuda.build))


@pytest.fixture
def on_host(library, monkeypatch):
    """Makes backend="cuda" run the wgmma kernel in the emulation; on_host(library) uses another build of it."""

    def use(library=library):
        use_kernel(monkeypatch, "wgmma")
        monkeypatch.setattr(native, "load", lambda: (emulated_cuda.Native(library), ""))
        library.set_shared_limit(227 << 10)

    emulated_cuda.guard_memory(monkeypatch)
    use()
    return use


def wide(hidden=(20, 17), **case):
    """A case with an additional layer that is wide enough for this kernel."""
    return Case(**case, hidden=(*hidden, 130))


@HALVES
@AFTER
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_eager(case, after, dtype, on_host):
    assert_forward_as_accurate(wide(**CASES[case], ensemble_after=after), dtype)


@AFTER
@pytest.mark.parametrize(("unfold", "ensemble", "cell"), FLAGS)
def test_flags(unfold, ensemble, cell, after, on_host):
    flags = {"feat_unfold": unfold, "local_ensemble": ensemble, "cell_decode": cell, "ensemble_after": after}
    assert_forward_as_accurate(wide(**flags), torch.bfloat16)


@pytest.mark.parametrize(("after", "queries"), [("last", 900), ("first", 1800)])
def test_clusters_that_decode_several_tiles(after, queries, on_host):
    """Seven or more tiles of 256 rows for the emulation's two clusters, so that the ring and the turns wrap around."""
    case = Case(batch=1, queries=queries, hidden=(200, 256, 130), ensemble_after=after)
    assert_forward_as_accurate(case, torch.float16)


def test_launches(on_host, library, monkeypatch):
    """The weights' kernel, and clusters of two blocks: for each tile, or one block a multiprocessor."""
    monkeypatch.setattr(backends, "stream", lambda device: 0x5EED)
    for queries, blocks in ((40, 2), (900, 4)):
        emulated_cuda.launches(library)
        wide(batch=1, queries=queries).decode(torch.float16, "cuda")
        _, decoder = launches = emulated_cuda.launches(library)
        assert {launch.stream for launch in launches} == {0x5EED}
        assert (decoder.blocks, decoder.cluster, decoder.threads) == (blocks, 2, 384)
        assert 6 * (32 << 10) < decoder.shared <= 227 << 10


@HALVES
def test_the_rounding_of_tensor_cores_is_within_the_documented_error(dtype, on_host, library):
    library.set_truncating(True)
    try:
        assert_forward_as_accurate(wide(batch=1), dtype)
    finally:
        library.set_truncating(False)


def test_agrees_with_the_mma_kernel(on_host, monkeypatch):
    """Only the order of additions within a layer differs."""
    case = wide(batch=1)
    wgmma = case.decode(torch.float16, "cuda")[0]
    use_kernel(monkeypatch, "mma")
    assert (wgmma - case.decode(torch.float16, "cuda")[0]).abs().max() <= 2e-3


@HALVES
def test_equals_liif(dtype, golden, on_host):
    arrays = golden("liif_full256")
    depth = sum(key.startswith("state.") and key.endswith(".weight") for key in arrays)
    names = [f"state.imnet.layers.{2 * i}" for i in range(depth)]
    some = slice(0, 40)
    feat, coord, cell = arrays["feat"].to(dtype), arrays["coord"][:, some], arrays["cell"][:, some]
    weights, biases = ([arrays[f"{n}.{kind}"].to(dtype) for n in names] for kind in ("weight", "bias"))
    kernel, eager = (
        local_implicit_decode(feat, coord, cell, weights, biases, backend=b) for b in ("cuda", "reference")
    )
    assert_as_accurate([kernel], [eager], [arrays["out"][:, some].double()])


# Faults that the emulation must detect: a file, the text to replace, its replacement, and the expected error; no error
# means that the results must be wrong.
SM90, WEIGHTS = "local_implicit_sm90.cu", "local_implicit_weights.cu"
FAULTS = {
    "no opt-in": ("launch.cuh", "shared > 48 << 10", "shared > 512 << 10", "shared memory without an opt-in"),
    "not swizzled": (WEIGHTS, "(at % 8 ^ n % 8)", "at % 8", ""),
    "wrong stride": (SM90, "1024 / 16", "2048 / 16", "outside shared memory"),
    "slice released too early": (SM90, "          wait_for_products<1>();\n", "", ""),
    "sum read too early": (SM90, "products<0>", "products<1>", "a register of a pending product was written"),
    "half the bytes": (SM90, "[at.index], slice_bytes)", "[at.index], slice_bytes / 2)", "deadlock"),
    "no barrier at the end": (SM90, "  cluster_barrier();  //", "  //", "shared memory of a block that has ended"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_detects(fault, on_host, tmp_path, built_once, if_changed):
    *replacement, error = FAULTS[fault]

    def run(_):
        built = built_once("emulated_cuda", emulated_cuda.build)
        on_host(emulated_cuda.build_with_fault(tmp_path, built, *replacement))
        case = Case(batch=1, queries=200, hidden=(256, 256, 130))
        if error:
            with pytest.raises(RuntimeError, match=error):
                case.decode(torch.bfloat16, "cuda")
        else:
            with pytest.raises(AssertionError):
                assert_forward_as_accurate(case, torch.bfloat16)

    if_changed(run, {"emulation": emulated_cuda.files("local_implicit")})


CHOICES = [
    ((9, 0), (256, 256, 3), True),
    ((9, 0), (129, 16, 3), True),
    ((9, 0), (16, 130, 3), True),
    ((9, 0), (256, 3), False),  # no layer between the first and the last
    ((9, 0), (128, 128, 300), False),
    ((8, 9), (256, 256, 3), False),
    ((10, 0), (256, 256, 3), False),
    ((12, 0), (256, 256, 3), False),
]


@pytest.mark.parametrize(("capability", "widths", "wgmma"), CHOICES)
def test_kernel_choice(capability, widths, wgmma, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    hoisted = SimpleNamespace(shape=(1, 2, 2, widths[0]), is_cuda=True, device="cuda")
    arguments = SimpleNamespace(hoisted=hoisted, weights=[torch.empty(n, 1) for n in widths[1:]])
    assert op.uses_wgmma(arguments) == wgmma
    assert not op.uses_wgmma(arguments, "mma")


def test_wgmma_requested_for_narrow_layers_raises(on_host):
    with pytest.raises(ValueError, match="more than 128 channels"):
        Case(hidden=(16, 128)).decode(torch.float16, "cuda")


@pytest.mark.gpu
@HALVES
@AFTER
@pytest.mark.parametrize("case", [*CASES, "paper"])
def test_on_hopper(case, after, dtype, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        return  # no wgmma there
    use_kernel(monkeypatch, "wgmma", op.why_not_cuda)
    shape = CASES.get(case, {"channels": 64, "size": (48, 48), "queries": 30_000, "hidden": (256,) * 4})
    case = on_gpu(wide(**shape, ensemble_after=after))
    assert_forward_as_accurate(case, dtype)
    first, second = (case.decode(dtype, "cuda")[0] for _ in range(2))
    assert torch.equal(first, second)
