"""The accuracy of fourier_unit and conv3x3, against numpy, LaMa and float64, on every backend that runs here."""

import math
import sys

import numpy
import pytest
import torch
import torch.nn.functional as F
from fourier_unit_cases import SHAPES, Case, assert_kernel_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from op_backends import backends_of
from torch import nn

import inr_kernels
from inr_kernels import fourier_unit
from inr_kernels._core import backends, signs
from inr_kernels.fourier_unit import FFC_BN_ACT, conv3x3, op, triton_kernels
from inr_kernels.fourier_unit.arguments import PADDINGS
from inr_kernels.fourier_unit.op import dft_matmul

BACKENDS = backends_of("fourier_unit")
KERNELS = [name for name in BACKENDS if name != "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def lama_layer(arrays):
    layer = FFC_BN_ACT(16, 16, 3, 0.75, 0.75, padding=1, activation_layer=nn.ReLU, enable_lfu=False)
    layer.load_state_dict({name[6:]: value for name, value in arrays.items() if name.startswith("state.")})
    return layer


def close(ours, theirs):
    return (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ffc_even", "ffc_odd"])
def test_equals_lamas_training_step(golden, name, backend):
    arrays = golden(name)
    layer, leaves = lama_layer(arrays).train(), [arrays["xl"].requires_grad_(), arrays["xg"].requires_grad_()]
    with inr_kernels.backend(backend):
        out = layer(tuple(leaves))
        grads = torch.autograd.grad(out, leaves, [arrays["grad_yl"], arrays["grad_yg"]])
    assert close(out[0], arrays["train_yl"]) and close(out[1], arrays["train_yg"])
    assert close(grads[0], arrays["grad_xl"]) and close(grads[1], arrays["grad_xg"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ffc_even", "ffc_odd"])
def test_equals_lamas_evaluation(golden, name, backend):
    """The file holds the running statistics after the training step; yl and yg were computed with those before it."""
    arrays = golden(name)
    layer = lama_layer(arrays)
    after = {key: value.clone() for key, value in layer.state_dict().items() if "running" in key}
    before = {}
    with inr_kernels.backend(backend), torch.no_grad():
        layer.train()((arrays["xl"], arrays["xg"]))
        for key, value in layer.state_dict().items():
            if "running" in key:
                batch = (value - 0.9 * after[key]) / 0.1
                before[key] = (after[key] - 0.1 * batch) / 0.9
        layer.load_state_dict(before, strict=False)
        out = layer.eval()((arrays["xl"], arrays["xg"]))
        assert close(out[0], arrays["yl"]) and close(out[1], arrays["yg"])
        layer.train()((arrays["xl"], arrays["xg"]))
        assert all(close(layer.state_dict()[key], value) for key, value in after.items())


def numpys(x, weight, scale, shift, norm):
    """The unit in numpy."""
    z = numpy.fft.rfft2(x, norm=norm)
    parts = numpy.stack((z.real, z.imag), 2).reshape(len(x), -1, *z.shape[2:])
    mixed = numpy.einsum("oi,bihw->bohw", weight, parts) * scale[:, None, None] + shift[:, None, None]
    mixed = numpy.maximum(mixed, 0).reshape(len(x), -1, 2, *z.shape[2:])
    return numpy.fft.irfft2(mixed[:, :, 0] + 1j * mixed[:, :, 1], s=x.shape[2:], norm=norm)


@pytest.mark.parametrize("form", [*BACKENDS, "dft"])
@pytest.mark.parametrize("norm", ["ortho", "backward", "forward"])
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (4, 9), (9, 4), (1, 1), (1, 6), (7, 1), (2, 2)], ids=str)
def test_equals_numpy(size, norm, form):
    case = Case(size=size)
    x, weight, scale, shift = case.tensors
    zeros, ones = torch.zeros(12), torch.ones(12)
    expected = torch.from_numpy(numpys(x.numpy(), weight[:, :, 0, 0].numpy(), scale.numpy(), shift.numpy(), norm))
    arguments = (t.float() for t in (x, weight, scale, shift, zeros, ones))
    options = {"dft": True} if form == "dft" else {"backend": form}
    out = fourier_unit(*arguments, norm=norm, eps=0.0, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_as_accurate_as_eager(dtype, training, backend):
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="it takes float32, bfloat16 and float16; got float64"):
            Case(training=training).run(dtype, backend)
        return
    assert_kernel_as_accurate(Case(training=training), dtype, backend)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, training):
    assert_kernel_as_accurate(Case(**SHAPES[name], training=training), torch.float32, "cpu")


@pytest.mark.parametrize("longest", [4, 64])
@pytest.mark.parametrize("name", ["many channels", "groups", "one row"])
def test_shapes_in_triton(monkeypatch, name, longest):
    """Small maps are transformed by matrix products, larger ones by FFTs."""
    monkeypatch.setattr(dft_matmul, "LONGEST", longest)
    assert_kernel_as_accurate(Case(**SHAPES[name], training=True), torch.float32, "triton")


@st.composite
def cases(draw, largest):
    groups, training = draw(st.integers(1, 2)), draw(st.booleans())
    return Case(
        batch=draw(st.integers(1, 3)),
        channels=groups * draw(st.integers(1, 5)),
        outputs=groups * draw(st.integers(1, 5)),
        size=(draw(st.integers(3, largest)), draw(st.integers(3, largest))),
        groups=groups,
        training=training,
        norm=draw(st.sampled_from(["ortho", "backward", "forward"])),
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_more_images_and_channels_than_a_launch_takes_in_triton(groups, monkeypatch):
    z, weight = torch.randn(18, 2 * groups, 1, 3, dtype=torch.complex64), torch.randn(2 * groups, 4)
    whole = triton_kernels.product(z, weight, None, False, groups)
    monkeypatch.setattr(backends, "_GRID", 16)
    assert torch.equal(whole, triton_kernels.product(z, weight, None, False, groups))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(20), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_random_problems(case, dtype):
    assert_kernel_as_accurate(case, dtype, "cpu")


@settings(max_examples=4, deadline=None, derandomize=True)
@given(case=cases(9), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_random_problems_in_triton(case, dtype):
    assert_kernel_as_accurate(case, dtype, "triton")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (4, 3)], ids=str)
def test_gradcheck_through_the_kernel(size, training):
    case = Case(channels=2, outputs=2, size=size, training=training)
    leaves = [t.requires_grad_() for t in case.tensors]
    run = lambda *leaves: fourier_unit(*leaves, *map(torch.clone, case.statistics), training=training, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"dft": True}], ids=str)
def test_gradgradcheck(options):
    case = Case(batch=1, channels=1, outputs=1, size=(3, 4))
    leaves = [t.requires_grad_() for t in case.tensors]
    assert torch.autograd.gradgradcheck(lambda *leaves: fourier_unit(*leaves, *case.statistics, **options), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_overflow_in_half_precision(backend):
    """The spectrum's first value is 30000 · 4 = 120000, twice the maximum of float16; the image's values fit."""
    x = torch.full((1, 1, 4, 4), 30000.0, dtype=torch.float16)
    unit = torch.eye(2), torch.ones(2), torch.zeros(2), torch.zeros(2), torch.ones(2)
    out = fourier_unit(x, *unit, eps=0.0, backend=backend)
    assert out.dtype == torch.float16
    assert torch.equal(out, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_image(backend):
    x = torch.randn(2, 2, 5, 6)
    x[1, 0, 2, 2] = float("nan")
    unit = torch.randn(4, 4), torch.ones(4), torch.ones(4), torch.zeros(4), torch.ones(4)
    out = fourier_unit(x, *unit, backend=backend)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_deterministic_for_any_number_of_threads():
    case = Case(batch=1, channels=24, outputs=24, size=(60, 70), training=True)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 5, 5):
        torch.set_num_threads(threads)
        runs.append(fourier_unit(*(t.float() for t in case.tensors), training=True, backend="cpu"))
    torch.set_num_threads(before)
    for run in runs:
        torch.testing.assert_close(run, runs[0], rtol=1e-5, atol=1e-6)  # torch's own sums depend on the threads
    assert torch.equal(runs[2], runs[3])


# ------------------------------------------------------------------------------------------------ conv3x3

CONVOLUTIONS = {
    "smallest size for reflect padding": (1, 1, 0, 1, 2, 2),
    "odd": (2, 3, 2, 5, 7, 9),
    "whole panels": (1, 5, 0, 13, 64, 64),
    "one row of tiles": (2, 4, 3, 16, 2, 33),
    "columns in parts": (1, 2, 0, 3, 3, 261),
    "rows in parts": (1, 2, 3, 4, 131, 10),
    "runs of channels": (1, 130, 70, 14, 6, 6),
    "tall tiles": (2, 15, 4, 7, 7, 9),
    "one row of tall tiles": (1, 16, 0, 13, 2, 70),
    "panels of tall tiles over several rows": (1, 20, 0, 25, 19, 23),
    "parts of the outputs": (1, 17, 0, 250, 21, 35),
    "gradient of the weight by blocks": (1, 70, 64, 66, 33, 34),
}


def convolve(tensors, dtype, padding, backend):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    x, weight, bias, add, *other = leaves
    out = conv3x3(x, weight, bias, other=(other or [None])[0], add=add, relu=True, padding=padding, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_winograd_is_as_accurate_as_torchs_convolution(name, padding):
    batch, channels, others, outputs, *size = CONVOLUTIONS[name]
    shapes = [(batch, channels, *size), (outputs, channels + others, 3, 3), (outputs,), (batch, outputs, *size)]
    shapes += [(batch, others, *size)] if others else []
    tensors = [torch.randn(shape).double() for shape in shapes]
    truth = convolve(tensors, torch.float64, padding, "reference")
    runs = (convolve(tensors, torch.float32, padding, backend) for backend in ("cpu", "reference"))
    for ours, theirs, exact in zip(*runs, truth, strict=True):
        for norm in (torch.max, torch.linalg.vector_norm):
            error, other = (norm((run - exact).abs()).item() / norm(exact.abs()).item() for run in (ours, theirs))
            assert error <= 2 * other + 4e-7
    for ours, exact in zip(convolve(tensors, torch.float64, padding, "cpu"), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("channels", "others"), [(16, 0), (64, 0), (128, 384)])
def test_winograd_with_many_channels_has_at_most_twice_the_error(channels, others, relu):
    x, weight = torch.randn(1, channels + others, 34, 38), torch.randn(48, channels + others, 3, 3)
    x = x.relu() if relu else x
    parts = {"x": x[:, :channels], "other": x[:, channels:] if others else None}
    exact = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect").double(), weight.double())
    runs = [conv3x3(weight=weight, backend=backend, **parts) for backend in ("cpu", "reference")]
    ours, theirs = (torch.linalg.vector_norm(run - exact).item() for run in runs)
    assert ours <= 2 * theirs


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("channels", "others", "outputs", "size"), [(32, 0, 33, (131, 130)), (40, 30, 70, (35, 62)), (32, 0, 64, (32, 33))]
)
def test_gradient_of_the_weight_has_at_most_twice_the_error(channels, others, outputs, size, padding):
    x, grad = torch.randn(2, channels + others, *size).relu(), torch.randn(2, outputs, *size)
    grad *= torch.rand(grad.shape) < 0.5  # as behind a ReLU
    parts = x[:, :channels], x[:, channels:] if others else None
    wide = (None if part is None else part.double() for part in parts)
    exact = op.weight_gradient(*wide, grad.double(), padding, "reference")
    runs = [op.weight_gradient(*parts, grad, padding, backend) for backend in ("cpu", "reference")]
    ours, theirs = (torch.linalg.vector_norm(run - exact).item() for run in runs)
    assert ours <= 2 * theirs
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 3)
    assert torch.equal(op.weight_gradient(*parts, grad, padding, "cpu"), runs[0])
    torch.set_num_threads(before)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_derivatives_of_the_weight_gradient(padding, monkeypatch):
    for limit in ("MIN_POSITIONS", "MIN_CHANNELS"):
        monkeypatch.setattr(sys.modules["inr_kernels.fourier_unit.op.conv3x3"], limit, 0)
    shapes = [(2, 2, 5, 6), (2, 1, 5, 6), (3, 3, 3, 3)]
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    run = lambda x, other, weight: conv3x3(x, weight, other=other, padding=padding, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    x, other, _ = (leaf.detach() for leaf in leaves)
    grad = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.library.opcheck(torch.ops.inr_kernels.conv3x3_weight_gradient.default, (x, other, grad, padding, ""))
    for wrong in (grad[..., 1:], grad[0]):
        with pytest.raises(ValueError, match="grad must have"):
            op.weight_gradient(x, other, wrong, padding, "")


@pytest.mark.parametrize("size", [(12, 13), (48, 50)])
@pytest.mark.parametrize("padding", PADDINGS)
def test_opcheck_of_the_weight_gradient_with_channels_last(padding, size):
    x, grad = (torch.randn(2, n, *size).contiguous(memory_format=torch.channels_last) for n in (34, 36))
    torch.library.opcheck(torch.ops.inr_kernels.conv3x3_weight_gradient.default, (x, None, grad, padding, ""))


def test_halves_of_a_tensor_are_convolved_without_a_copy():
    x, weight = torch.randn(2, 7, 6, 5), torch.randn(4, 7, 3, 3)
    parts = x.split((3, 4), 1)
    whole = conv3x3(x.flip(3).flip(3), weight)
    torch.testing.assert_close(conv3x3(parts[0], weight, other=parts[1]), whole)
    turned = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv3x3(turned[:, :3], weight, other=turned[:, 3:]), whole)


@pytest.mark.parametrize("padding", PADDINGS)
def test_gradgradcheck_through_winograd(padding):
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in [(1, 2, 3, 4), (2, 2, 3, 3)]]
    leaves = [t.requires_grad_() for t in leaves]
    run = lambda x, weight: conv3x3(x, weight, relu=True, padding=padding, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(2, 2), (5, 7), (13, 33), (8, 32)])
def test_prepared_weights(size, dtype):
    """The kernels with weights that they have transformed, and with what only a kept layer adds: its own input."""
    x, other, add, residual = (torch.randn(2, n, *size, dtype=dtype) for n in (5, 14, 21, 21))
    weight, bias = torch.randn(21, 19, 3, 3, dtype=dtype), torch.randn(21, dtype=dtype)
    for padding in ("reflect", "zeros"):
        kernel = op.NativeConv3x3.constant(weight, bias, True, padding)
        expected = conv3x3(x, weight, bias, other=other, add=add, relu=True, padding=padding, backend="reference")
        torch.testing.assert_close(kernel(x, other, add, residual), expected + residual, rtol=1e-4, atol=1e-4)
    weight, shift = torch.randn(12, 6, dtype=dtype), torch.randn(12, dtype=dtype)
    z = torch.randn(2, 6, *size, dtype=torch.complex64 if dtype == torch.float32 else torch.complex128)
    for summand in (None, shift):
        product = op.NativeProduct.constant(weight, summand, True, 2)
        expected = op.STEPS["reference"]().product(z, weight, summand, True, 2)
        torch.testing.assert_close(product(z), expected)
        torch.testing.assert_close(product(z, add_input=True), expected + z)
    weight, bias = torch.randn(9, 5, 1, 1, dtype=dtype), torch.randn(9, dtype=dtype)
    pointwise = op.NativeConv2d.pointwise(weight, bias, True)
    torch.testing.assert_close(pointwise(x, None, (2, 9, *size)), F.conv2d(x, weight, bias).relu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_equals_torchs_convolution(dtype):
    x, weight = torch.randn(1, 3, 5, 6).to(dtype), torch.randn(2, 3, 3, 3).to(dtype)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight)
    assert torch.equal(conv3x3(x, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, 70_003])
def test_signs(count, dtype):
    x = torch.randn(count, dtype=dtype)
    x[1::3] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype).repeat(count)[: len(x[1::3])]
    bits, grad = signs.pack(x), x.flip(0)
    assert len(bits) == -(-count // 8) and torch.equal(signs.unpack(bits, (count,)), x > 0)
    expected = torch.where(x > 0, grad, 0)
    torch.testing.assert_close(signs.select(grad, bits), expected, rtol=0, atol=0, equal_nan=True)
    by_torch = signs._packed(x > 0)  # elsewhere than on a CPU
    assert torch.equal(by_torch, bits)
