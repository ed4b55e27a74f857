"""Tests elementwise_filter's CUDA kernels in an emulation on the host; tests that need a GPU are marked."""

from dataclasses import replace
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from elementwise_filter_cases import DELTA, SHAPES, Case, assert_forward_as_accurate

from inr_kernels import elementwise_filter
from inr_kernels._core import backends, native
from inr_kernels._core.dispatch import always
from inr_kernels._core.proof.problems import of_op
from inr_kernels.elementwise_filter import op
from inr_kernels.elementwise_filter.arguments import Facts

pytestmark = pytest.mark.slow  # compiles the emulation
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ALL_TERMS = (0.5, 0.25, 2.0)


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


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, on_host):
    padding = "zeros" if isinstance(SHAPES[name].get("dilation"), tuple) else "reflect"
    softmax = len(name) % 3 > 0
    case = Case(**SHAPES[name], padding=padding, normalize="taps" if softmax else "none", coefficients=ALL_TERMS)
    assert_forward_as_accurate(case, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("padding", backends.PADDINGS)
@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 3)])
@pytest.mark.parametrize("width", [8, 9, 11, 14])
def test_borders(width, kernel_size, padding, dtype, on_host):
    """Whole and partial groups of four pixels, with and without vector loads, in both kernels."""
    options = {"size": (5, width), "padding": padding, "normalize": "taps", "window": True, "groups": 3}
    case = Case(batch=1, kernel_size=kernel_size, coefficients=ALL_TERMS, **options)
    assert_forward_as_accurate(case, dtype, "cuda")


@DTYPES
def test_many_channels_share_their_logits(dtype, on_host):
    for kernel_size in ((3, 3), (1, 7)):
        case = Case(batch=1, channels=22, groups=2, kernel_size=kernel_size, normalize="taps", coefficients=DELTA)
        assert_forward_as_accurate(case, dtype, "cuda")


def test_vectors_and_single_values_are_the_same(on_host):
    """A view that begins one value after an aligned address is read value by value."""
    case = Case(size=(6, 12), normalize="taps")
    x, kernel = (t.float() for t in case.tensors[:2])
    options = case.options(torch.float32)
    aligned = elementwise_filter(x, kernel, **options, backend="cuda")
    views = [torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, kernel)]
    assert all(t.data_ptr() % 16 == 4 for t in views)
    assert torch.equal(elementwise_filter(*views, **options, backend="cuda"), aligned)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 5)])
def test_logits_that_are_not_finite(kernel_size, value, on_host):
    """One logit of a pixel, and all of another."""
    case = Case(batch=1, channels=2, groups=1, size=(4, 6), kernel_size=kernel_size, normalize="taps")
    x, kernel = (t.float() for t in case.tensors[:2])
    kernel[0, 3, 1, 2] = value
    kernel[0, :, 2, 4] = value
    kernel_out, eager = (
        elementwise_filter(x, kernel, **case.options(torch.float32), backend=name) for name in ("cuda", "reference")
    )
    assert torch.equal(kernel_out.isnan(), eager.isnan())
    finite = eager.isfinite()
    assert (kernel_out - eager)[finite].abs().max() <= 1e-6 * eager[finite].abs().max()


def test_nan_stays_in_its_pixels(on_host):
    x, kernel = torch.randn(1, 2, 9, 10), torch.randn(1, 18, 9, 10)
    x[0, 0, 4, 5] = float("nan")
    out = elementwise_filter(x, kernel, kernel_size=3, backend="cuda")
    assert out.isnan().sum() == out[0, 0, 3:6, 4:7].isnan().sum() == 9


def test_an_empty_output(on_host):
    x, kernel = torch.empty(0, 4, 5, 6), torch.empty(0, 36, 5, 6)
    assert elementwise_filter(x, kernel, kernel_size=3, backend="cuda").shape == x.shape


def test_launches(on_host, library, monkeypatch):
    """A launch for each dilation, on the given stream: a thread for four pixels of up to eight, or four, channels."""
    monkeypatch.setattr(backends, "stream", lambda device: 0x5EED)
    x, kernel = torch.zeros(2, 20, 30, 35), torch.zeros(2, 2 * 9, 30, 35)
    emulated_cuda.launches(library)
    elementwise_filter(x, kernel, kernel_size=3, groups=2, dilation=(1, 3), backend="cuda")
    one, three = emulated_cuda.launches(library)
    assert {(launch.stream, launch.threads, launch.shared) for launch in (one, three)} == {(0x5EED, 128, 0)}
    blocks = 2 * 2 * -(-30 * 9 // 128)
    assert (one.blocks, three.blocks) == (blocks * 2, blocks * 3)


# Faults that the emulation must detect by wrong results: the text to replace, and its replacement.
FAULTS = {
    "reflected edge": ("2 * (n - 1) - i", "2 * n - 1 - i"),
    "rescaling": ("filtered[c][i] *= rescale", "filtered[c][i] *= 1"),
    "last pixels": ("min(pixels, p.out_width - X)", "min(pixels - 1, p.out_width - X)"),
    "taps": ("3 * i + j", "3 * j + i"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_detects(fault, on_host, tmp_path, built_once, if_changed):
    def run(_):
        built = built_once("emulated_cuda", emulated_cuda.build)
        on_host(emulated_cuda.build_with_fault(tmp_path, built, "elementwise_filter.cu", *FAULTS[fault]))
        with pytest.raises(AssertionError):
            for kernel_size in ((3, 3), (1, 5)):
                options = {"size": (4, 10), "kernel_size": kernel_size, "padding": "reflect", "normalize": "taps"}
                assert_forward_as_accurate(Case(batch=1, **options), torch.float32, "cuda")

    if_changed(run, {"emulation": emulated_cuda.files("elementwise_filter")})


GPU = Facts(torch.device("cuda"), torch.float32, taps=9, normalize="taps")
REASONS = {
    "none": (GPU, ""),
    "half precision": (replace(GPU, dtype=torch.bfloat16, taps=81, normalize="none"), ""),
    "a CPU": (replace(GPU, device=torch.device("cpu")), "it takes CUDA tensors; these are on cpu"),
    "float64": (replace(GPU, dtype=torch.float64), "it takes float32, bfloat16 and float16; got float64"),
    "one softmax": (replace(GPU, normalize="all"), "it takes normalize 'none' and 'taps'; got 'all'"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reason_why_cuda_cannot_run(case, monkeypatch):
    facts, reason = REASONS[case]
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
    x, kernel = torch.zeros(1, 2, 5, 6), torch.zeros(1, 18, 5, 6)
    arguments = op.Arguments(x, kernel, (3, 3), 2, (1,), 1, 1, "zeros", "taps", 0.0, 0.0, 1.0, None)
    with pytest.raises(RuntimeError, match="CUDA: "):
        op.cuda_backend().forward(arguments)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("padding", backends.PADDINGS)
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_gpu(name, padding, dtype):
    if padding == "valid" and isinstance(SHAPES[name].get("dilation"), tuple):
        return  # no such call
    case = Case(**SHAPES[name], padding=padding, normalize="taps", window=True, coefficients=ALL_TERMS)
    case.tensors = tuple(t.cuda() for t in case.tensors)
    assert_forward_as_accurate(case, dtype, "cuda")
