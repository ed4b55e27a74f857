"""Tests elementwise_filter's CUDA kernels in an emulation on the host; tests that need a GPU are marked."""

import os
from dataclasses import replace
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch
from elementwise_filter_cases import DELTA, SHAPES, Case, assert_forward_as_accurate, assert_kernel_as_accurate

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


def no_triton(*args, **needs):
    raise RuntimeError("Triton's backward was called")


@pytest.fixture
def on_host(library, monkeypatch):
    """Makes backend="cuda" run on CPU tensors in the emulation; on_host(library) uses another build of it."""

    def use(library=library):
        monkeypatch.setitem(op.OP.backends, "cuda", replace(op.cuda_backend(), why_not=always))
        monkeypatch.setattr(native, "load", lambda: (emulated_cuda.Native(library), ""))

    monkeypatch.setattr(op, "_TRITON", replace(op._TRITON, backward=no_triton))
    emulated_cuda.guard_memory(monkeypatch)
    use()
    return use


@DTYPES
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, on_host):
    padding = "zeros" if isinstance(SHAPES[name].get("dilation"), tuple) else "reflect"
    softmax = len(name) % 3 > 0
    case = Case(**SHAPES[name], padding=padding, normalize="taps" if softmax else "none", coefficients=ALL_TERMS)
    assert_as_accurate_as_eager(case, dtype)


def assert_as_accurate_as_eager(case, dtype):
    """The output, and the gradients where they are not Triton's."""
    dilations = case.dilation if isinstance(case.dilation, tuple) else (case.dilation,)
    has_backward = op.has_cuda_backward(case.kernel_size, dilations, case.stride, case.upscale)
    (assert_kernel_as_accurate if has_backward else assert_forward_as_accurate)(case, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("padding", backends.PADDINGS)
@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 3)])
@pytest.mark.parametrize("width", [8, 9, 11, 14])
def test_borders(width, kernel_size, padding, dtype, on_host):
    """Whole and partial groups of four pixels, with and without vector loads, in both kernels."""
    options = {"size": (5, width), "padding": padding, "normalize": "taps", "window": True, "groups": 3}
    case = Case(batch=1, kernel_size=kernel_size, coefficients=ALL_TERMS, **options)
    assert_kernel_as_accurate(case, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("padding", backends.PADDINGS)
@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 5), (3, 5)])
def test_rectangles_and_halos(kernel_size, padding, dtype, on_host):
    """Maps of several rectangles along both axes, of whole quads and of others, with far taps."""
    for size, dilation in (((40, 148), 1), ((50, 75), 2)):
        options = {"size": size, "padding": padding, "dilation": dilation, "normalize": "taps", "window": True}
        case = Case(batch=1, channels=1, groups=1, kernel_size=kernel_size, coefficients=ALL_TERMS, **options)
        assert_kernel_as_accurate(case, dtype, "cuda")


@DTYPES
def test_rectangles_of_several_images_groups_and_dilations(dtype, on_host):
    options = {"size": (50, 75), "dilation": (1, 2), "normalize": "taps", "coefficients": ALL_TERMS}
    assert_kernel_as_accurate(Case(batch=2, channels=4, groups=2, **options), dtype, "cuda")


@pytest.mark.parametrize("padding", ["replicate", "reflect"])
def test_borders_that_fold_onto_all_pixels(padding, on_host):
    """Sides about as long as the reach, where taps beyond both borders read a pixel."""
    for size in ((5, 6), (9, 5), (1, 3), (2, 2)):
        options = {"size": size, "padding": padding, "normalize": "taps", "coefficients": ALL_TERMS}
        for kernel_size, dilation in (((5, 5), 2), ((3, 3), 4), ((5, 3), (1, 2)), ((3, 3), 1)):
            case = Case(batch=1, channels=2, groups=1, kernel_size=kernel_size, dilation=dilation, **options)
            assert_kernel_as_accurate(case, torch.float32, "cuda")


@pytest.mark.parametrize("needed", [0, 1])
@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 5)])
def test_each_needed_gradient_alone(kernel_size, needed, on_host):
    """The same bits as with the other one."""
    case = Case(channels=4, groups=2, kernel_size=kernel_size, padding="reflect", normalize="taps", coefficients=DELTA)
    out, leaves = case.forward(torch.float32, "cuda")
    both = torch.autograd.grad(out, leaves, torch.ones_like(out))
    leaves = [t.detach().requires_grad_(i == needed) for i, t in enumerate(leaves)]
    out = elementwise_filter(*leaves, **case.options(torch.float32), backend="cuda")
    (alone,) = torch.autograd.grad(out, [leaves[needed]], torch.ones_like(out))
    assert torch.equal(alone, both[needed])


TRITONS = {
    "many taps": {"kernel_size": (3, 9)},
    "far taps": {"dilation": 5},
    "many dilations": {"dilation": (1,) * 9},
    "a stride": {"stride": 2},
    "upscaling": {"upscale": 2},
}


@pytest.mark.parametrize("name", TRITONS)
def test_the_backward_of_some_calls_is_tritons(name, on_host):
    case = Case(batch=1, channels=1, groups=1, **TRITONS[name])
    with pytest.raises(RuntimeError, match="Triton's backward"):
        case.run(torch.float32, "cuda")


def test_a_gradient_of_no_output(on_host):
    """Triton's backward returns its zeros, without a launch."""
    x, kernel = torch.empty(0, 4, 5, 6, requires_grad=True), torch.empty(0, 36, 5, 6)
    with pytest.raises(RuntimeError, match="Triton's backward"):
        elementwise_filter(x, kernel, kernel_size=3, backend="cuda").sum().backward()


@DTYPES
def test_many_channels_share_their_logits(dtype, on_host):
    for kernel_size in ((3, 3), (1, 7)):
        case = Case(batch=1, channels=22, groups=2, kernel_size=kernel_size, normalize="taps", coefficients=DELTA)
        assert_kernel_as_accurate(case, dtype, "cuda")


def test_vectors_and_single_values_are_the_same(on_host):
    """A view that begins one value after an aligned address is read value by value."""
    case = Case(size=(6, 12), normalize="taps")
    x, kernel = (t.float() for t in case.tensors[:2])
    options = case.options(torch.float32)
    views = [torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, kernel)]
    assert all(t.data_ptr() % 16 == 4 for t in views)
    runs = []
    for leaves in ((x, kernel), views):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = elementwise_filter(*leaves, **options, backend="cuda")
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 5)])
def test_logits_that_are_not_finite(kernel_size, value, on_host):
    """One logit of a pixel, and all of another."""
    case = Case(batch=1, channels=2, groups=1, size=(4, 6), kernel_size=kernel_size, normalize="taps")
    x, kernel = (t.float() for t in case.tensors[:2])
    kernel[0, 3, 1, 2] = value
    kernel[0, :, 2, 4] = value
    assert_nan_as_in_eager(x, kernel, torch.randn_like(x), case.options(torch.float32))


def assert_nan_as_in_eager(x, kernel, grad, options):
    """The output and the gradients are NaN where eager's are, and elsewhere about the same; returns them."""
    results = []
    for backend in ("cuda", "reference"):
        leaves = [t.detach().requires_grad_() for t in (x, kernel)]
        out = elementwise_filter(*leaves, **options, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), eager.isnan())
        finite = eager.isfinite()
        assert (ours - eager)[finite].abs().max() <= 1e-6 * eager[finite].abs().max()
    return results[0]


@pytest.mark.parametrize("normalize", ["none", "taps"])
@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 5)])
@pytest.mark.parametrize("name", ["x", "kernel", "grad"])
def test_nan_stays_in_its_pixels(name, kernel_size, normalize, on_host):
    case = Case(batch=1, channels=2, groups=2, size=(9, 10), kernel_size=kernel_size, normalize=normalize)
    tensors = {"x": case.tensors[0].float(), "kernel": case.tensors[1].float(), "grad": torch.randn(1, 2, 9, 10)}
    tensors[name][0, 0, 4, 5] = float("nan")
    results = assert_nan_as_in_eager(**tensors, options=case.options(torch.float32))
    height, width = kernel_size
    rows, columns = slice(4 - height // 2, 5 + height // 2), slice(5 - width // 2, 6 + width // 2)
    for t in results:  # none in other pixels, and none in the other group
        t[:, : t.shape[1] // 2, rows, columns] = 0
        assert t.isfinite().all()


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


@pytest.mark.parametrize("backward", [False, True])
def test_too_many_blocks_are_refused(backward, on_host):
    """2^32 blocks, of which a grid's 32 bits would be 0, and one more image's."""
    given = {"groups": 2**12, "padding": 0, "normalize": 1, "stride": 1, "upscale": 1, "x": None, "log_window": None}
    given |= {"out_size": (1, 1), "kernel_size": (3, 3), "dilations": [1], "coefficients": (0.0, 0.0, 1.0)}
    size = 2**20 + 1, 2**12, 1, 1
    problem = native.load()[0].ElementwiseFilter(type=0, size=size, kernel=(None, (0,) * 4), threads=1, **given)
    with pytest.raises(RuntimeError, match="too large a grid"):
        if backward:
            problem.backward_cuda(log_window=None, grad_out=None, x=None, kernel=None, stream=None)
        else:
            problem.forward_cuda(log_window=None, out=None, stream=None)


def test_launches_of_the_backward(on_host, library, monkeypatch):
    """One launch for all dilations; the shared memory of weights and two tiles with a halo."""
    monkeypatch.setattr(backends, "stream", lambda device: 0x5EED)
    x, kernel = torch.zeros(2, 20, 30, 35, requires_grad=True), torch.zeros(2, 2 * 9, 30, 35)
    found = {}
    for dilation in ((1,), (1, 3)):
        out = elementwise_filter(x, kernel, kernel_size=3, groups=2, dilation=dilation, backend="cuda")
        emulated_cuda.launches(library)
        out.sum().backward()
        (launch,) = emulated_cuda.launches(library)
        assert launch.stream == 0x5EED
        found[dilation] = launch.blocks, launch.threads, launch.shared
    # Two rectangles of 15 rows and 36 columns, with halos of one or three rows, and of four columns; nine quads a row.
    assert found[1,] == (2 * 2 * 2, 160, (9 + 2) * 4 * (15 + 2) * 44)
    assert found[1, 3] == (2 * 2 * 2, 192, (9 + 2) * 4 * (15 + 6) * 44)


@pytest.fixture
def set_order(library):
    """Sets the order of warps and blocks, for one test."""
    yield library.set_order
    library.set_order(int(os.environ.get("INR_EMULATION_ORDER", 0)))


def test_the_same_bits_in_any_order(on_host, set_order):
    case = Case(batch=1, channels=1, groups=1, size=(40, 70), padding="reflect", normalize="taps")
    runs = []
    for seed in (0, 1, 2):
        set_order(seed)
        runs.append(case.run(torch.float32, "cuda"))
    assert all(map(torch.equal, *runs[:2])) and all(map(torch.equal, *runs[1:]))


# Faults that the emulation must detect by wrong results: a file, the text to replace, its replacement, and the message:
# the first tensor that is wrong, of the output and the gradients of x and of the kernel.
FORWARD, BACKWARD = "elementwise_filter.cu", "elementwise_filter_backward.cu"
OUTPUT, OF_X, OF_KERNEL = (f"tensor {i}, max: error" for i in range(3))
FAULTS = {
    "reflected edge": (FORWARD, "padded_index(p.padding, x - 1,", "padded_index(p.padding, x - 2,", OUTPUT),
    "rescaling": (FORWARD, "filtered[c][i] *= rescale", "filtered[c][i] *= 1", OUTPUT),
    "last pixels": (FORWARD, "min(pixels, p.out_width - X)", "min(pixels - 1, p.out_width - X)", OUTPUT),
    "taps": (FORWARD, "3 * i + j", "3 * j + i", OUTPUT),
    "halo": (BACKWARD, "r.halo[axis] = divide_up(reach[axis], unit) * unit", "r.halo[axis] = 0", OF_X),
    "no barrier of the copies": (BACKWARD, "__syncthreads();  // all threads", "// all threads", OF_X),
    "no barrier of the weights": (BACKWARD, "__syncthreads();  // the copies and", "// the copies and", OF_X),
    "folded taps": (BACKWARD, "size - 1 + n - reach", "size + n - reach", OF_X),
    "zero weights": (BACKWARD, "copy({0, 0, 0, 0}, weights", "copy({NAN, 0, 0, 0}, weights", OF_X),
    "the mean": (BACKWARD, "v[t][i] - mean[i]", "v[t][i]", OF_KERNEL),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_detects(fault, on_host, tmp_path, built_once, if_changed):
    def run(_):
        built = built_once("emulated_cuda", emulated_cuda.build)
        *change, message = FAULTS[fault]
        on_host(emulated_cuda.build_with_fault(tmp_path, built, *change))
        with pytest.raises(AssertionError, match=message):
            for kernel_size in ((3, 3), (1, 5)):
                options = {"size": (40, 70), "kernel_size": kernel_size, "padding": "reflect", "normalize": "taps"}
                assert_kernel_as_accurate(Case(batch=1, channels=2, groups=1, **options), torch.float32, "cuda")

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
    with pytest.raises(RuntimeError, match="CUDA: "):
        op.cuda_backend().backward(x[None], arguments, needs_x=True, needs_kernel=True)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("padding", backends.PADDINGS)
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_gpu(name, padding, dtype):
    if padding == "valid" and isinstance(SHAPES[name].get("dilation"), tuple):
        return  # no such call
    case = Case(**SHAPES[name], padding=padding, normalize="taps", window=True, coefficients=ALL_TERMS)
    case.tensors = tuple(t.cuda() for t in case.tensors)
    assert_kernel_as_accurate(case, dtype, "cuda")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 5)])
def test_paper_shape_on_a_gpu(kernel_size, dtype):
    case = Case(channels=64, groups=64, size=(64, 64), kernel_size=kernel_size, normalize="taps", coefficients=DELTA)
    case.tensors = tuple(None if t is None else t.cuda() for t in case.tensors)
    assert_kernel_as_accurate(case, dtype, "cuda")
    first, second = (case.run(dtype, "cuda") for _ in range(2))
    assert all(map(torch.equal, first, second))
