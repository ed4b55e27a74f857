"""fourier_unit and conv3x3 apart from their values: errors, empty calls, threads, torch.compile, export, opcheck."""

import re

import pytest
import torch
from fourier_unit_cases import Case
from op_backends import backends_of

import inr_kernels
from inr_kernels import FourierUnit, explain, fourier_unit
from inr_kernels.fourier_unit import conv3x3

BACKENDS = backends_of("fourier_unit")
RANDOM = torch.Generator().manual_seed(0)  # finite differences across a ReLU's kink are wrong
X, WEIGHT = torch.randn(2, 4, 5, 6, generator=RANDOM), torch.randn(12, 8, generator=RANDOM)
ONES, ZEROS = torch.ones(12), torch.zeros(12)
GOOD = {"x": X, "weight": WEIGHT, "bn_weight": ONES, "bn_bias": ZEROS, "running_mean": ZEROS, "running_var": ONES}

# What is wrong -> changes to a good call, the error, and what its text must say.
BAD = {
    "x no tensor": ({"x": [1]}, TypeError, "x must be a torch.Tensor; got list"),
    "x integer": ({"x": X.int()}, TypeError, "x must have a floating-point dtype; got torch.int32"),
    "x of 3 dimensions": ({"x": X[0]}, ValueError, r"x must have 4 dimensions; got \[4, 5, 6\]"),
    "x without pixels": ({"x": X[..., :0]}, ValueError, "at least one channel and one pixel"),
    "wrong channels": (
        {"x": X[:, :3]},
        ValueError,
        r"weight must have shape \[2 O, 6\] or that with \[1, 1\], for x's 3 channels; got \[12, 8\]",
    ),
    "weight of a larger kernel": (
        {"weight": torch.zeros(12, 8, 3, 3)},
        ValueError,
        r"weight must have shape \[2 O, 8\] or that with \[1, 1\]",
    ),
    "weight of 3 dimensions": ({"weight": WEIGHT[None]}, ValueError, "weight must have 2 or 4 dimensions"),
    "an odd number of rows": ({"weight": WEIGHT[:11]}, ValueError, "weight must have two rows per output channel"),
    "no rows": ({"weight": WEIGHT[:0]}, ValueError, "weight must have two rows per output channel"),
    "groups that do not divide": ({"groups": 3}, ValueError, "groups must divide x's 4 channels; got 3"),
    "zero groups": ({"groups": 0}, ValueError, "groups must divide x's 4 channels; got 0"),
    "another device": ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu; got meta"),
    "a short vector": ({"bn_bias": ZEROS[:4]}, ValueError, r"bn_bias must have weight's 12 rows; got \[4\]"),
    "no bn_weight": ({"bn_weight": None}, TypeError, "bn_weight must be a torch.Tensor; got NoneType"),
    "no statistics": ({"running_var": None}, ValueError, "running_var must be a tensor unless training; got None"),
    "one value to train on": (
        {"x": X[:1, :, :1, :1], "training": True},
        ValueError,
        r"x must have more than one frequency in all to train batch norm on; got \[1, 4, 1, 1\]",
    ),
    "an empty batch to train on": ({"x": X[:0], "training": True}, ValueError, "x must have more than one frequency"),
    "no such norm": ({"norm": "unitary"}, ValueError, "norm must be one of ortho, backward, forward; got 'unitary'"),
    "no such backend": ({"backend": "fast"}, ValueError, "backend must be one of cpu, reference, triton"),
    "no such backend with dft": (
        {"backend": "fast", "dft": True},
        ValueError,
        "backend must be None or 'reference' with dft; got 'fast'",
    ),
    "a kernel with dft": ({"backend": "cpu", "dft": True}, ValueError, "backend must be None or 'reference' with"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changes, error, text = BAD[name]
    with pytest.raises(error, match=text):
        fourier_unit(**GOOD | changes)


KERNEL = torch.zeros(3, 4, 3, 3)
BAD_CONVOLUTIONS = {
    "one row, reflected": ({"x": X[:, :, :1]}, ValueError, "x must have sides of at least 2 with padding='reflect'"),
    "no such padding": (
        {"padding": "circular"},
        ValueError,
        "padding must be one of reflect, zeros, reflect transposed; got 'circular'",
    ),
    "no channels": ({"x": X[:, :0]}, ValueError, "x must have at least one channel"),
    "other channels": ({"x": X[:, :3]}, ValueError, r"weight must have shape \[O, 3, 3, 3\], O > 0; got"),
    "5 x 5": ({"weight": torch.zeros(3, 4, 5, 5)}, ValueError, r"weight must have shape \[O, 4, 3, 3\]"),
    "another input's size": ({"other": X[..., 1:]}, ValueError, "other must have x's batch and size"),
    "bias of another length": ({"bias": ZEROS}, ValueError, r"bias must have shape \[3\]; got \[12\]"),
    "add of another shape": ({"add": X}, ValueError, r"add must have shape \[2, 3, 5, 6\]; got \[2, 4, 5, 6\]"),
    "another dtype": ({"weight": KERNEL.double()}, ValueError, "weight must have x's dtype torch.float32"),
    "no such backend": ({"backend": "cup"}, ValueError, "backend must be one of .* for conv3x3; got 'cup'"),
    "another op's backend": ({"backend": "natten"}, ValueError, "backend must be one of .* for conv3x3; got 'natten'"),
}


@pytest.mark.parametrize("name", BAD_CONVOLUTIONS)
def test_bad_convolution(name):
    changes, error, text = BAD_CONVOLUTIONS[name]
    with pytest.raises(error, match=text):
        conv3x3(**{"x": X, "weight": KERNEL} | changes)


# Position in the op's arguments, a wrong value, and what the error must say.
OUT_OF_BOUNDS = [
    (0, X[0], "x must have 4 dimensions"),
    (1, WEIGHT[:, :7], r"weight must have shape \[2 O, 8\]"),
    (1, WEIGHT[:11], "weight must have two rows per output channel"),
    (1, WEIGHT.double(), "weight must have dtype torch.float32"),
    (2, ONES[:3], r"scale must have shape \[12\]; got \[3\]"),
    (3, ZEROS.double(), "shift must have dtype torch.float32"),
    (6, 3, "groups must divide x's 4 channels; got 3"),
    (7, "unitary", "norm must be one of ortho"),
]


@pytest.mark.parametrize(("position", "wrong", "text"), OUT_OF_BOUNDS)
def test_op_checks_bounds(position, wrong, text):
    op, good = torch.ops.inr_kernels.fourier_unit, [X, WEIGHT, ONES, ZEROS, False, 1e-5, 1, "ortho", ""]
    op(*good)
    with pytest.raises(ValueError, match=text):
        op(*good[:position], wrong, *good[position + 1 :])


def test_op_checks_gradient_and_statistics():
    good, none = [X, WEIGHT, ONES, ZEROS, False, 1e-5, 1, "ortho", ""], torch.empty(0)
    backward, grad = torch.ops.inr_kernels.fourier_unit_backward, torch.zeros(2, 6, 5, 6)
    backward(grad, none, none, *good, True, True, True)
    for tensors, name in [((X, none, none), "grad"), ((grad, ZEROS, none), "mean"), ((grad, none, ZEROS), "var")]:
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            backward(*tensors, *good, True, True, True)


OUT_OF_BOUNDS_CONVOLUTION = [
    (0, X[..., :1], "x must have sides of at least 2"),
    (1, KERNEL[:, :3], r"weight must have shape \[O, 4, 3, 3\]"),
    (1, KERNEL.double(), "weight must have x's dtype torch.float32"),
    (2, ONES, r"bias must have shape \[3\]; got \[12\]"),
    (3, X, r"weight must have shape \[O, 8, 3, 3\]"),
    (3, X[:1], "other must have x's batch and size"),
    (4, X, r"add must have shape \[2, 3, 5, 6\]"),
    (6, "valid", "padding must be one of reflect, zeros, reflect transposed; got 'valid'"),
]


@pytest.mark.parametrize(("position", "wrong", "text"), OUT_OF_BOUNDS_CONVOLUTION)
def test_convolution_checks_bounds(position, wrong, text):
    op, good = torch.ops.inr_kernels.conv3x3, [X, KERNEL, None, None, None, False, "reflect", ""]
    op(*good)
    with pytest.raises(ValueError, match=text):
        op(*good[:position], wrong, *good[position + 1 :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    leaves = [GOOD[name].clone().requires_grad_() for name in ("weight", "bn_weight", "bn_bias")]
    x = X[:0].clone().requires_grad_()
    out = fourier_unit(x, *leaves, ZEROS, ONES, backend=backend)
    assert out.shape == (0, 6, 5, 6)
    grads = torch.autograd.grad(out.sum(), [x, *leaves])
    assert [g.shape for g in grads] == [x.shape, *(t.shape for t in leaves)]
    assert not any(g.any() for g in grads)
    assert conv3x3(X[:0], KERNEL, backend=backend).shape == (0, 3, 5, 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("needed", ["x", "weight", "bn_bias"])
def test_only_needed_gradients_are_computed(needed, training, backend):
    full = GOOD | {name: GOOD[name].clone().requires_grad_() for name in ("x", "weight", "bn_weight", "bn_bias")}
    full |= {"running_mean": None, "running_var": None} if training else {}
    out = fourier_unit(**full, training=training, backend=backend)
    (expected,) = torch.autograd.grad(out.square().sum(), full[needed])
    one = full | {name: GOOD[name] for name in ("x", "weight", "bn_weight", "bn_bias") if name != needed}
    out = fourier_unit(**one, training=training, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), one[needed])[0], expected)


def test_nothing_of_the_spectrum_is_saved():
    leaves, saved = [GOOD[name].clone().requires_grad_() for name in ("x", "weight", "bn_weight", "bn_bias")], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        fourier_unit(*leaves, training=True)
    assert set(saved) == {X.shape, WEIGHT.shape, ONES.shape}


def test_kernels_raise_on_second_derivative():
    leaves = [t.requires_grad_() for t in Case().tensors]
    out = fourier_unit(*leaves, training=True, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="fourier_unit's kernels do not support second derivatives"):
        grad.sum().backward()


def test_transforms_of_torch_take_the_reference():
    x, unit = X[:1], (WEIGHT, ONES, ZEROS, ZEROS, ONES)
    many = torch.func.vmap(lambda x: fourier_unit(x[None], *unit)[0])(X)
    torch.testing.assert_close(many, fourier_unit(X, *unit))
    tangent = torch.func.jvp(lambda x: fourier_unit(x, *unit), (x,), (torch.ones_like(x),))[1]
    step = (fourier_unit(x + 1e-3, *unit) - fourier_unit(x - 1e-3, *unit)) / 2e-3
    torch.testing.assert_close(tangent, step, rtol=1e-2, atol=1e-2)
    many = torch.func.vmap(lambda x: conv3x3(x[None], KERNEL + 1)[0])(X)
    torch.testing.assert_close(many, conv3x3(X, KERNEL + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    weight = WEIGHT.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = fourier_unit(X, weight, ONES, ZEROS, ZEROS, ONES)
        assert conv3x3(X, KERNEL).dtype == dtype
    assert out.dtype == dtype
    assert torch.equal(out, fourier_unit(X.to(dtype), weight, ONES, ZEROS, ZEROS, ONES))
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_statistics_are_updated_as_by_batch_norm(momentum, backend):
    mean, var = torch.randn(12), torch.rand(12)
    expected = mean.clone(), var.clone()
    fourier_unit(X, WEIGHT, ONES, ZEROS, mean, var, training=True, momentum=momentum, backend=backend)
    z = torch.view_as_real(torch.fft.rfft2(X, norm="ortho")).permute(0, 1, 4, 2, 3).flatten(1, 2)
    z = torch.nn.functional.conv2d(z, WEIGHT[..., None, None])
    torch.nn.functional.batch_norm(z, *expected, training=True, momentum=momentum)
    torch.testing.assert_close((mean, var), expected)


def test_module_counts_like_batch_norm():
    unit, plain = FourierUnit(4, 6), torch.nn.BatchNorm2d(12)
    unit.bn.momentum = plain.momentum = None
    for _ in range(2):
        x = torch.randn(2, 4, 5, 6)
        unit(x)
        z = torch.view_as_real(torch.fft.rfft2(x, norm="ortho")).permute(0, 1, 4, 2, 3).flatten(1, 2)
        plain(unit.conv_layer(z))
    torch.testing.assert_close(dict(unit.bn.state_dict()), dict(plain.state_dict()))


def arguments(training, gradients=False):
    case = Case(training=training)
    x, weight, scale, shift = (t.requires_grad_(gradients) for t in case.tensors)
    weight = weight.detach().flatten(1).requires_grad_(gradients)
    return x, weight, scale, shift, training, 1e-5, 1, "ortho", ""


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_opcheck_forward(training, gradients):
    torch.library.opcheck(torch.ops.inr_kernels.fourier_unit.default, arguments(training, gradients))


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("training", [False, True])
def test_opcheck_backward(training, needs):
    tensors, form = arguments(training)[:4], arguments(training)[4:]
    with torch.no_grad():
        y, mean, var = torch.ops.inr_kernels.fourier_unit(*tensors, *form)
    args = torch.randn_like(y), mean, var, *tensors, *form, *needs
    torch.library.opcheck(torch.ops.inr_kernels.fourier_unit_backward.default, args)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("padding", "optional"), [("reflect", [(4,), (2, 2, 5, 6), (2, 4, 5, 6)]), ("zeros", [None, None, None])]
)
def test_opcheck_conv3x3(padding, optional, gradients):
    shapes = [(2, 3, 5, 6), (4, 5 if any(optional) else 3, 3, 3), *optional]
    tensors = [shape and torch.randn(shape).requires_grad_(gradients) for shape in shapes]
    torch.library.opcheck(torch.ops.inr_kernels.conv3x3.default, (*tensors, True, padding, ""))


class Model(torch.nn.Module):
    """A unit followed by a convolution."""

    def __init__(self):
        super().__init__()
        self.unit, self.weight = FourierUnit(4, 6), torch.nn.Parameter(torch.randn(4, 6, 3, 3))

    def forward(self, x):
        return conv3x3(self.unit(x), self.weight, relu=True)


def test_compile_trains():
    model, runs = Model(), []
    for run in (model, torch.compile(model, fullgraph=True)):
        out = run(X)
        runs.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for eager, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)


def test_compile_infers_with_other_shapes():
    model = Model().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((5, 6), (8, 9), (12, 7)):
            x = torch.randn(2, 4, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_export():
    model = Model().eval()
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X), rtol=1e-4, atol=1e-5)


class WithDft(torch.nn.Module):
    """A unit in the form that exports to ONNX."""

    def forward(self, x):
        return fourier_unit(x, WEIGHT, ONES, ZEROS, ZEROS, ONES, dft=True)


def test_dft_has_no_fft_and_no_complex_number_in_its_graph():
    program = torch.export.export(WithDft(), (X,))
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert ops and not [op for op in ops if "fft" in op or "complex" in op or "inr_kernels" in op]
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    assert not [value for value in values if isinstance(value, torch.Tensor) and value.is_complex()]
    torch.testing.assert_close(program.module()(X), fourier_unit(*GOOD.values()), rtol=1e-4, atol=1e-5)


def test_explain_and_requested_backend(capsys, monkeypatch):
    text = explain(fourier_unit, X.bfloat16())
    assert capsys.readouterr().out.strip() == text
    assert text.startswith("fourier_unit on cpu, bfloat16\n  cpu        runs  <- default")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run fourier_unit: it takes CUDA tensors"):
        fourier_unit(**GOOD, backend="triton")
    with inr_kernels.backend("reference"):
        expected = torch.nn.functional.conv2d(X, KERNEL + 1, padding=1)
        assert torch.equal(conv3x3(X, KERNEL + 1, padding="zeros"), expected)


def test_explain_of_the_convolution(capsys):
    assert re.search("cpu +runs.*<- default", explain(conv3x3, X, KERNEL))


def test_fast_half_precision_is_torchs_convolution(fast_half):
    x, kernel = X.half(), KERNEL.half()
    assert "reference  runs  <- default" in explain(conv3x3, x, kernel)
    message = "backend 'cpu' cannot run conv3x3: it takes float32 and float64, and half precision where .*; got float16"
    with inr_kernels.backend("cpu"), pytest.raises(RuntimeError, match=message):
        conv3x3(x, kernel)


def test_requested_backend_in_a_compiled_graph():
    compiled = torch.compile(lambda x: conv3x3(x, KERNEL + 1, backend="cpu"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), conv3x3(X, KERNEL + 1, backend="cpu"))
    with pytest.raises(Exception, match=r"backend must be one of .* for conv3x3; got 'cup'"):
        torch.compile(lambda x: conv3x3(x, KERNEL, backend="cup"), fullgraph=True)(X)


@pytest.mark.parametrize("op", [fourier_unit, conv3x3])
def test_works_in_a_forked_child(op, in_a_fork):
    unit, kernel = (torch.randn(64, 64), *(torch.ones(64) for _ in range(4))), torch.randn(32, 32, 3, 3)
    x = torch.randn(1, 32, 24, 40)  # torch fills what is larger (poison) with threads that a child lacks
    arguments = unit if op is fourier_unit else (kernel,)
    threads = 1 if op is fourier_unit else None  # for torch's Fourier transform, as DataLoader asks, too
    assert in_a_fork(lambda: op(x, *arguments, backend="cpu"), threads)
