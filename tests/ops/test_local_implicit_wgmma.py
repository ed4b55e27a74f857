"""local_implicit's kernel for sm_90a in the emulation, which reads its weights through wgmma's matrix descriptors."""

import shutil
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from local_implicit_cases import FLAGS, Case, assert_as_accurate
from test_local_implicit_cuda import AFTER, CASES, HALVES, KERNELS, assert_forward_as_accurate, on_gpu

from inr_kernels import local_implicit_decode
from inr_kernels._core import dispatch, native
from inr_kernels.local_implicit import op

pytestmark = pytest.mark.slow  # compiles the emulation


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated_cuda.build(tmp_path_factory.mktemp("wgmma"), *KERNELS)


@pytest.fixture
def on_host(library, monkeypatch):
    """on_host(): backend="cuda" is the wgmma kernel in the emulation; on_host(library) in one of its own."""

    def use(library=library):
        monkeypatch.setitem(dispatch.OPS["local_implicit"].backends, "cuda", lambda facts: "")
        monkeypatch.setattr(native, "load", lambda: (emulated_cuda.Native(library), ""))
        monkeypatch.setattr(op, "cuda_kernel", "wgmma")
        library.set_shared_limit(227 << 10)

    use()
    return use


def wide(hidden=(20, 17), **case):
    """A case with one layer more, wide enough for this kernel."""
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
    """Seven or more tiles of 256 rows for the emulation's two clusters: the ring and the turns go round."""
    case = Case(batch=1, queries=queries, hidden=(200, 256, 130), ensemble_after=after)
    assert_forward_as_accurate(case, torch.float16)


def test_equals_the_other_kernel(on_host, monkeypatch):
    """The same products in the same order of additions, but for the layers' own."""
    case = wide(batch=1)
    wgmma = case.decode(torch.float16, "cuda")[0]
    monkeypatch.setattr(op, "cuda_kernel", "mma")
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


# What must not happen unnoticed: a file, what is replaced in it and by what, and the emulation's words; or none, where
# the numbers show it.
SM90, WEIGHTS = "local_implicit_sm90.cu", "local_implicit_weights.cu"
FAULTS = {
    "not swizzled": (WEIGHTS, "(at % 8 ^ n % 8)", "at % 8", ""),
    "another stride": (SM90, "1024 / 16", "2048 / 16", "outside shared memory"),
    "a slice given back too early": (SM90, "          wait_for_products<1>();\n", "", ""),
    "a sum read too early": (SM90, "products<0>", "products<1>", "a register of a product under way was written"),
    "half the bytes": (SM90, "[at.index], slice_bytes)", "[at.index], slice_bytes / 2)", "waits for ever"),
    "no barrier at the end": (SM90, "  cluster_barrier();  //", "  //", "the memory of a block that has ended"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_notices(fault, on_host, tmp_path):
    file, old, new, words = FAULTS[fault]
    shutil.copytree(emulated_cuda.ROOT / "csrc", tmp_path / "csrc")
    faulty = tmp_path / "csrc" / "cuda" / file
    assert old in faulty.read_text()
    faulty.write_text(faulty.read_text().replace(old, new))
    on_host(emulated_cuda.build(tmp_path, *KERNELS, csrc=tmp_path / "csrc"))
    case = Case(batch=1, queries=200, hidden=(256, 256, 130))
    if words:
        with pytest.raises(RuntimeError, match=words):
            case.decode(torch.bfloat16, "cuda")
    else:
        with pytest.raises(AssertionError):
            assert_forward_as_accurate(case, torch.bfloat16)


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
def test_the_choice_of_the_kernel(capability, widths, wgmma, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    hoisted = SimpleNamespace(shape=(1, 2, 2, widths[0]), is_cuda=True, device="cuda")
    weights = [torch.empty(n, 1) for n in widths[1:]]
    assert op.uses_wgmma(hoisted, weights) == wgmma
    monkeypatch.setattr(op, "cuda_kernel", "mma")
    assert not op.uses_wgmma(hoisted, weights)


def test_a_wish_that_cannot_be_met(on_host):
    with pytest.raises(ValueError, match="more than 128 channels"):
        Case(hidden=(16, 128)).decode(torch.float16, "cuda")


@pytest.mark.gpu
@HALVES
@AFTER
@pytest.mark.parametrize("case", [*CASES, "paper"])
def test_on_hopper(case, after, dtype, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        return  # no wgmma there
    monkeypatch.setattr(op, "cuda_kernel", "wgmma")
    shape = CASES.get(case, {"channels": 64, "size": (48, 48), "queries": 30_000, "hidden": (256,) * 4})
    case = on_gpu(wide(**shape, ensemble_after=after))
    assert_forward_as_accurate(case, dtype)
    first, second = (case.decode(dtype, "cuda")[0] for _ in range(2))
    assert torch.equal(first, second)
