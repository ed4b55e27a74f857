"""The accuracy of elementwise_filter, against upstream code and float64, on every backend that runs here."""

import pytest
import torch
import torch.nn.functional as F
from elementwise_filter_cases import DELTA, LITERAL, PLAIN, SHAPES, Case, assert_kernel_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from op_backends import backends_of

from inr_kernels import elementwise_filter
from inr_kernels.elementwise_filter import pixelwise_reconstruct

BACKENDS = backends_of("elementwise_filter")
KERNELCONV = [f"kernelconv_k{k}_r{r}_{i}" for k in (3, 5) for r in (1, 2) for i in (0, 1)]


def close(ours, theirs):
    return (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*KERNELCONV, "fac_k3", "fac_k5"])
def test_equals_misf_and_stfan(golden, name, backend):
    """MISF's KernelConv pads with zeros, STFAN's kernel2d_conv replicates; kernelconv_*_1 has a batch above K²."""
    arrays = golden(name)
    options = {"kernel_size": int(arrays.pop("kernel_size")), "dilation": int(arrays.pop("dilation", 1))}
    if backend == "triton":  # one image: the interpreter takes half a minute for the whole batch
        arrays = {key: array[:1] for key, array in arrays.items() if array.dim()}
    x, kernel = arrays["x"].requires_grad_(), arrays["kernel"].requires_grad_()
    padding = "replicate" if name.startswith("fac") else "zeros"
    out = elementwise_filter(x, kernel, padding=padding, **options, backend=backend)
    grads = torch.autograd.grad(out, [x, kernel], arrays["grad_out"])
    assert close(out, arrays["out"])
    assert close(grads[0], arrays["grad_x"])
    assert close(grads[1], arrays["grad_kernel"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_rafts_upsampling(golden, backend):
    arrays = golden("raft_upsample_flow")
    mask = F.pixel_shuffle(arrays["mask"], 8)
    out = elementwise_filter(8 * arrays["flow"], mask, kernel_size=3, upscale=8, normalize="taps", backend=backend)
    assert close(out, arrays["out"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["pasa_g1_s1", "pasa_g2_s2", "pasa_g4_s2"])
def test_equals_pasa(golden, name, backend):
    arrays = golden(name)
    stride = int(arrays["stride"])
    options = {"kernel_size": 3, "stride": stride, "padding": "reflect", "normalize": "all", "backend": backend}
    assert close(elementwise_filter(arrays["x"], arrays["logits"][:, :, ::stride, ::stride], **options), arrays["out"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal_numbers(backend):
    x = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 1, 3)
    kernel = torch.tensor([10.0, 100.0, 1000.0]).view(1, 3, 1, 1).expand(1, 3, 1, 3)
    options = {"kernel_size": (1, 3), "backend": backend}
    for padding, expected in {
        "zeros": [2100.0, 3210.0, 320.0],
        "replicate": [2110.0, 3210.0, 3320.0],
        "reflect": [2120.0, 3210.0, 2320.0],
    }.items():
        assert elementwise_filter(x, kernel, padding=padding, **options).flatten().tolist() == expected
    assert elementwise_filter(x, kernel[..., :1], padding="valid", **options).item() == 3210


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("coefficients", [PLAIN, DELTA, LITERAL, (0.5, 0.25, 2.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("normalize", ["none", "taps", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_eager(dtype, normalize, coefficients):
    case = Case(groups=3, normalize=normalize, coefficients=coefficients, window=normalize != "none")
    assert_kernel_as_accurate(case, dtype, "cpu")


@pytest.mark.parametrize("padding", ["zeros", "replicate", "reflect", "valid"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, padding):
    shape = SHAPES[name]
    if padding == "valid" and isinstance(shape.get("dilation"), tuple):
        shape = shape | {"dilation": 2}
    for normalize, dtype in (("none", torch.float32), ("taps", torch.float32), ("all", torch.bfloat16)):
        case = Case(**shape, padding=padding, normalize=normalize, coefficients=LITERAL)
        assert_kernel_as_accurate(case, dtype, "cpu")


@st.composite
def cases(draw, largest=20):
    padding = draw(st.sampled_from(["zeros", "replicate", "reflect", "valid"]))
    dilations = st.integers(1, 4)
    if padding != "valid":
        dilations = st.one_of(dilations, st.lists(dilations, min_size=1, max_size=3).map(tuple))
    groups, normalize = draw(st.integers(1, 3)), draw(st.sampled_from(["none", "taps", "all"]))
    return Case(
        batch=draw(st.integers(1, 3)),
        channels=groups * draw(st.integers(1, 3)),
        size=(draw(st.integers(1, largest)), draw(st.integers(1, largest))),
        groups=groups,
        kernel_size=(draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 3, 5, 7]))),
        dilation=draw(dilations),
        stride=draw(st.integers(1, 3)),
        upscale=draw(st.integers(1, 3)),
        padding=padding,
        normalize=normalize,
        coefficients=draw(st.sampled_from([PLAIN, DELTA, LITERAL, (-1.0, 0.0, 1.0), (0.5, 0.25, 2.0)])),
        window=normalize != "none" and draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "taps innermost", "every second"])),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_random_problems(case, dtype):
    assert_kernel_as_accurate(case, dtype, "cpu")


@settings(max_examples=3, deadline=None, derandomize=True)
@given(case=cases(largest=5), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_random_problems_in_triton(case, dtype):
    assert_kernel_as_accurate(case, dtype, "triton")


@pytest.mark.parametrize("normalize", ["none", "taps", "all"])
@pytest.mark.parametrize("padding", ["zeros", "replicate", "reflect", "valid"])
def test_gradcheck_through_the_kernel(padding, normalize):
    case = Case(1, 4, (3, 4), 2, padding=padding, normalize=normalize, coefficients=LITERAL, upscale=2, stride=3)
    x, kernel = (t.requires_grad_() for t in case.tensors[:2])
    filtered = lambda *leaves: elementwise_filter(*leaves, **case.options(), backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(filtered, [x, kernel])


def test_gradgradcheck_through_the_reference():
    case = Case(1, 2, (2, 3), 1, normalize="taps", padding="reflect", dilation=(1,), coefficients=DELTA)
    leaves = [t.requires_grad_() for t in case.tensors[:2]]
    filtered = lambda *leaves: elementwise_filter(*leaves, **case.options(), backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(filtered, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixelwise_reconstruct_shares_one_kernel(backend):
    image, kernel = torch.rand(2, 3, 5, 6, requires_grad=True), torch.rand(2, 9, 5, 6, requires_grad=True)
    out = pixelwise_reconstruct(image, kernel, backend=backend)
    expected = (F.unfold(image, 3, padding=1).view(2, 3, 9, 5, 6) * kernel.unsqueeze(1)).sum(2)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(o.square().sum(), [image, kernel]) for o in (out, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["taps", "all"])
def test_extreme_logits(normalize, backend):
    x, kernel = torch.randn(1, 2, 4, 5), torch.randn(1, 18, 4, 5)
    kernel[0, 3] = 1e4
    kernel[0, 4] = -1e4
    kernel[0, 5] = -float("inf")
    out = elementwise_filter(x, kernel, kernel_size=3, normalize=normalize, backend=backend)
    expected = elementwise_filter(x.double(), kernel.double(), kernel_size=3, normalize=normalize, backend="reference")
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["none", "taps", "all"])
def test_nan_stays_in_its_pixel(normalize, backend):
    x, kernel = torch.randn(1, 2, 4, 17), torch.randn(1, 18, 4, 17)
    kernel[0, 4, 2, 7] = float("nan")
    kernel.requires_grad_()
    out = elementwise_filter(x, kernel, kernel_size=3, normalize=normalize, backend=backend)
    wrong = torch.zeros_like(out, dtype=torch.bool)
    wrong[0, : 1 if normalize != "all" else 2, 2, 7] = True
    assert torch.equal(out.isnan(), wrong)
    (grad,) = torch.autograd.grad(out.nansum(), kernel)
    assert not grad[..., 3, :].isnan().any()


def test_gradients_are_deterministic_for_any_number_of_threads():
    case = Case(batch=1, channels=4, groups=1, size=(90, 120), kernel_size=(5, 5), normalize="taps", dilation=(1, 2))
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 5, 5):
        torch.set_num_threads(threads)
        runs.append(case.run(torch.float32, "cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
