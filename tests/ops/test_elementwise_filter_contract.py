"""elementwise_filter apart from its values: errors, empty calls, threads, torch.compile, export, opcheck."""

import pytest
import torch
from elementwise_filter_cases import DELTA, Case
from op_backends import backends_of

import inr_kernels
from inr_kernels import ElementwiseFilter, elementwise_filter, explain
from inr_kernels.elementwise_filter import pixelwise_reconstruct

BACKENDS = backends_of("elementwise_filter")
X, KERNEL = torch.zeros(2, 4, 5, 6), torch.zeros(2, 36, 5, 6)

# What is wrong -> changes to a good call, the error, and what its text must say.
BAD = {
    "x no tensor": ({"x": [1]}, TypeError, "x must be a torch.Tensor; got list"),
    "x integer": ({"x": X.int()}, TypeError, "x must have a floating-point dtype; got torch.int32"),
    "x of 3 dimensions": ({"x": X[0]}, ValueError, r"x must have 4 dimensions; got \[4, 5, 6\]"),
    "x without pixels": ({"x": X[..., :0]}, ValueError, "at least one channel and one pixel"),
    "kernel no tensor": ({"kernel": None}, TypeError, "kernel must be a torch.Tensor; got NoneType"),
    "kernel of 5 dimensions": ({"kernel": KERNEL[None]}, ValueError, "kernel must have 4 dimensions"),
    "another batch": ({"kernel": KERNEL[:1]}, ValueError, r"kernel must have x's batch of 2; got \[1, 36, 5, 6\]"),
    "another device": ({"kernel": KERNEL.to("meta")}, ValueError, "kernel must be on cpu; got meta"),
    "another dtype": (
        {"kernel": KERNEL.double()},
        ValueError,
        "kernel must have x's dtype torch.float32; got torch.float64",
    ),
    "channels that are no multiple of K²": (
        {"kernel": KERNEL[:, :35]},
        ValueError,
        r"kernel must have groups x 9 channels \(kernel_size 3 x 3\); got \[2, 35, 5, 6\]",
    ),
    "no kernel channels": ({"kernel": KERNEL[:, :0]}, ValueError, "kernel must have groups x 9 channels"),
    "channels for other groups": (
        {"groups": 2},
        ValueError,
        r"kernel must have 2 groups x 9 = 18 channels; got \[2, 36, 5, 6\]",
    ),
    "groups that do not divide C": ({"kernel": KERNEL[:, :27]}, ValueError, "groups must divide x's 4 channels; got 3"),
    "zero groups": ({"groups": 0}, ValueError, "groups must divide x's 4 channels; got 0"),
    "another size": (
        {"kernel": KERNEL[..., 1:]},
        ValueError,
        r"kernel must have the output's size \[5, 6\]; got \[2, 36, 5, 5\]",
    ),
    "another size at stride 2": ({"stride": 2}, ValueError, r"the output's size \[3, 3\]; got \[2, 36, 5, 6\]"),
    "another size at upscale 2": ({"upscale": 2}, ValueError, r"the output's size \[10, 12\]"),
    "even K": ({"kernel_size": 4}, ValueError, r"kernel_size must be K or \(kh, kw\), both odd; got 4"),
    "one even side": ({"kernel_size": (3, 2)}, ValueError, r"both odd; got \(3, 2\)"),
    "three sides": ({"kernel_size": (3, 3, 3)}, ValueError, "both odd"),
    "negative K": (
        {"kernel_size": -3},
        ValueError,
        "kernel_size must be a positive integer or a tuple of them; got -3",
    ),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation must be a positive integer or a tuple of them; got 0"),
    "no dilation": ({"dilation": ()}, ValueError, r"dilation must be .* got \(\)"),
    "a fraction": ({"dilation": 1.5}, ValueError, "dilation must be .* got 1.5"),
    "stride 0": ({"stride": 0}, ValueError, "stride must be a positive integer; got 0"),
    "upscale 0.5": ({"upscale": 0.5}, ValueError, "upscale must be a positive integer; got 0.5"),
    "no such padding": ({"padding": "circular"}, ValueError, "padding must be one of zeros, replicate, reflect, valid"),
    "no such softmax": ({"normalize": "channels"}, ValueError, "normalize must be one of none, taps, all"),
    "reflection at a side of the reach": (
        {"padding": "reflect", "dilation": 5},
        ValueError,
        r"x must have sides longer than the reach \[5, 5\] with padding='reflect'; got \[2, 4, 5, 6\]",
    ),
    "valid on too small an x": (
        {"padding": "valid", "dilation": 3},
        ValueError,
        r"x must be larger than \[6, 6\] with padding='valid'; got \[2, 4, 5, 6\]",
    ),
    "valid with a stack": (
        {"padding": "valid", "dilation": (1, 2)},
        ValueError,
        r"dilation must have one value with padding='valid'; got \(1, 2\)",
    ),
    "window without softmax": ({"log_window": torch.zeros(3, 3)}, ValueError, "log_window must be None without"),
    "window of another shape": (
        {"log_window": torch.zeros(9, 1), "normalize": "taps"},
        ValueError,
        r"log_window must have shape \[3, 3\]; got \[9, 1\]",
    ),
    "window to be trained": (
        {"log_window": torch.zeros(3, 3, requires_grad=True), "normalize": "taps"},
        ValueError,
        "log_window must be a constant",
    ),
    "no such backend": ({"backend": "fast"}, ValueError, "backend must be one of cpu, reference, triton"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changes, error, text = BAD[name]
    with pytest.raises(error, match=text):
        elementwise_filter(**{"x": X, "kernel": KERNEL, "kernel_size": 3} | changes)


@pytest.mark.parametrize("channels", [4, 8, 0])
def test_reconstruction_requires_odd_squares(channels):
    with pytest.raises(ValueError, match="kernel must have K² channels, K odd"):
        pixelwise_reconstruct(X, torch.zeros(2, channels, 5, 6))


# Position in the op's arguments, a wrong value, and what the error must say.
OUT_OF_BOUNDS = [
    (0, X[0], "x must have 4 dimensions"),
    (1, KERNEL[:, :9], r"kernel must have 4 groups x 9 = 36 channels; got \[2, 9, 5, 6\]"),
    (1, KERNEL[..., 1:], r"kernel must have the output's size \[5, 6\]"),
    (1, KERNEL[:1], "kernel must have x's batch of 2"),
    (1, KERNEL.half(), "kernel must have x's dtype torch.float32; got torch.float16"),
    (2, [3, 5], "kernel must have 4 groups x 15 = 60 channels"),
    (2, [4, 4], r"kernel_size must be \(kh, kw\), both odd"),
    (2, [3], r"kernel_size must be \(kh, kw\), both odd"),
    (2, [-3, 3], "kernel_size must be a positive integer"),
    (3, 3, "groups must divide x's 4 channels; got 3"),
    (3, 0, "groups must divide x's 4 channels; got 0"),
    (4, [0], "dilation must be a positive integer"),
    (4, [], "dilation must be a positive integer"),
    (5, 2, r"kernel must have the output's size \[3, 3\]"),
    (5, 0, "stride must be a positive integer"),
    (6, 2, r"kernel must have the output's size \[10, 12\]"),
    (7, "none", "padding must be one of zeros"),
    (8, "zeros", "normalize must be one of none"),
    (12, torch.zeros(2, 2), r"log_window must have shape \[3, 3\]; got \[2, 2\]"),
    (12, torch.zeros(3, 3), "log_window must be None without a softmax"),
]


@pytest.mark.parametrize(("position", "wrong", "text"), OUT_OF_BOUNDS)
def test_op_checks_bounds(position, wrong, text):
    op = torch.ops.inr_kernels.elementwise_filter
    good = [X, KERNEL, [3, 3], 4, [1], 1, 1, "zeros", "none", 0.0, 0.0, 1.0, None, ""]
    op(*good)
    with pytest.raises(ValueError, match=text):
        op(*good[:position], wrong, *good[position + 1 :])


@pytest.mark.parametrize(
    ("window", "error", "text"),
    [
        (
            torch.zeros(3, 3, dtype=torch.int32),
            TypeError,
            "log_window must have a floating-point dtype; got torch.int32",
        ),
        (torch.zeros(9), ValueError, r"log_window must have 2 dimensions; got \[9\]"),
        (torch.zeros(3, 3, requires_grad=True), ValueError, "log_window must be a constant"),
    ],
)
def test_op_and_function_check_the_window(window, error, text):
    with pytest.raises(error, match=text):
        torch.ops.inr_kernels.elementwise_filter(
            X, KERNEL, [3, 3], 4, [1], 1, 1, "zeros", "taps", 0.0, 0.0, 1.0, window, ""
        )
    with pytest.raises(error, match=text):
        elementwise_filter(X, KERNEL, kernel_size=3, normalize="taps", log_window=window)


@pytest.mark.parametrize("wrong", [X[None, :1], X[None].double()])
def test_op_checks_the_gradient(wrong):
    good = [X, KERNEL, [3, 3], 4, [1], 1, 1, "zeros", "none", 0.0, 0.0, 1.0, None, ""]
    with pytest.raises(ValueError, match="grad must have"):
        torch.ops.inr_kernels.elementwise_filter_backward(wrong, *good, True, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x, kernel = X[:0].clone().requires_grad_(), KERNEL[:0].clone().requires_grad_()
    out = elementwise_filter(x, kernel, kernel_size=3, normalize="taps", backend=backend)
    assert out.shape == (0, 4, 5, 6)
    grads = torch.autograd.grad(out.sum(), [x, kernel])
    assert [g.shape for g in grads] == [x.shape, kernel.shape]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", ["x", "kernel"])
@pytest.mark.parametrize("normalize", ["none", "taps"])
def test_only_needed_gradients_are_computed(needed, normalize, backend):
    tensors = {"x": torch.randn(1, 2, 4, 5), "kernel": torch.randn(1, 18, 4, 5)}
    full = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    expected = torch.autograd.grad(
        elementwise_filter(**full, kernel_size=3, normalize=normalize, backend=backend).square().sum(), full[needed]
    )
    tensors[needed].requires_grad_()
    out = elementwise_filter(**tensors, kernel_size=3, normalize=normalize, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), tensors[needed]), expected)


def test_only_the_inputs_are_saved():
    x, kernel = torch.randn(1, 2, 4, 5, requires_grad=True), torch.randn(1, 18, 4, 5, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        elementwise_filter(x, kernel, kernel_size=3, normalize="taps", alpha=2, gamma=-1)
    assert saved == [x.data_ptr(), kernel.data_ptr()]


def test_transforms_use_the_reference():
    x, kernel = torch.randn(1, 2, 4, 5), torch.randn(1, 18, 4, 5)
    filtered = lambda x: elementwise_filter(x, kernel, kernel_size=3, normalize="taps")  # noqa: E731
    expected = torch.autograd.grad(filtered(x.requires_grad_()).square().sum(), x)[0]
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(lambda x: filtered(x).square().sum())(x), expected)
    torch.testing.assert_close(torch.func.jvp(filtered, (x,), (x,))[1], filtered(x))  # it is linear in x
    with pytest.raises(RuntimeError, match="'cpu' does not support forward-mode AD"):
        torch.func.jvp(lambda x: elementwise_filter(x, kernel, kernel_size=3, backend="cpu"), (x,), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_mixes_dtypes(dtype):
    x, kernel = torch.randn(1, 2, 4, 5).to(dtype), torch.randn(1, 18, 4, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = elementwise_filter(x, kernel, kernel_size=3, normalize="taps")
    assert out.dtype == dtype
    out.sum().backward()
    assert kernel.grad.dtype == torch.float32


def arguments(gradients=False, **options):
    case = Case(**{"groups": 2, "channels": 4, "normalize": "taps", "coefficients": DELTA} | options)
    x, kernel, window = case.tensors
    o = case.options()
    dilation = [*o["dilation"]] if isinstance(o["dilation"], tuple) else [o["dilation"]]
    form = [[*o["kernel_size"]], o["groups"], dilation, o["stride"], o["upscale"], o["padding"], o["normalize"]]
    form += [o["alpha"], o["beta"], o["gamma"], window, ""]
    return x.requires_grad_(gradients), kernel.requires_grad_(gradients), *form


OPTIONS = [{}, {"dilation": (1, 2), "window": True}, {"stride": 2, "normalize": "none", "layout": "channels_last"}]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck_forward(options, gradients):
    torch.library.opcheck(torch.ops.inr_kernels.elementwise_filter.default, arguments(gradients, **options))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(needs):
    args = arguments()
    grad = torch.randn(1, *args[0].shape, dtype=torch.float64)
    torch.library.opcheck(torch.ops.inr_kernels.elementwise_filter_backward.default, (grad, *args, *needs))


class Model(torch.nn.Module):
    """A layer that predicts logits, and the filter, as in training."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Conv2d(4, 36, 1)
        self.filter = ElementwiseFilter(3, normalize="taps", alpha=2.0, gamma=-1.0, log_window=torch.randn(3, 3))

    def forward(self, x):
        return self.filter(x, self.logits(x))


def test_compile_trains():
    model, x = Model(), torch.randn(2, 4, 5, 6)
    compiled = torch.compile(model, fullgraph=True)
    runs = []
    for run in (model, compiled):
        out = run(x)
        runs.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for eager, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-6)


def test_compile_infers_with_other_shapes():
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((5, 6), (8, 9), (12, 7)):
            x = torch.randn(2, 4, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_export():
    model, x = Model(), torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_layer_rejects_unknown_options():
    with pytest.raises(TypeError, match="options must be keywords of elementwise_filter; got dilations"):
        ElementwiseFilter(3, dilations=2)
    assert repr(ElementwiseFilter(3, stride=2)) == "ElementwiseFilter(3, stride=2)"
    assert not Model().filter.state_dict()


def test_explain_and_requested_backend(capsys, monkeypatch):
    text = explain(elementwise_filter, X.bfloat16())
    assert capsys.readouterr().out.strip() == text
    assert text.startswith("elementwise_filter on cpu, bfloat16\n  cpu        runs  <- default")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run elementwise_filter: it takes CUDA tensors"):
        elementwise_filter(X, KERNEL, kernel_size=3, backend="triton")
    with inr_kernels.backend("reference"):
        assert torch.equal(elementwise_filter(X, KERNEL, kernel_size=3), X)


def test_works_in_a_forked_child(in_a_fork):
    x, kernel = torch.randn(1, 8, 64, 64), torch.randn(1, 72, 64, 64)
    assert in_a_fork(lambda: elementwise_filter(x, kernel, kernel_size=3, backend="cpu"))


@pytest.mark.gpu
def test_more_than_two_billion_elements():
    x = torch.randn(1, 512, 700, 700, device="cuda", dtype=torch.float16)
    kernel = torch.randn(1, 512 * 9, 700, 700, device="cuda", dtype=torch.float16)
    assert kernel.numel() > 2**31
    out = elementwise_filter(x, kernel, kernel_size=3, backend="triton")
    last = elementwise_filter(x[:, -1:], kernel[:, -9:], kernel_size=3, backend="reference")
    torch.testing.assert_close(out[:, -1:], last, rtol=1e-2, atol=1e-2)
