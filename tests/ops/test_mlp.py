"""mlp: numbers against torch's layers, gradients, errors, layouts, and where torch computes it."""

import pytest
import torch
from mlp_cases import CASES, Case, assert_kernel_as_accurate
from torch import nn

from inr_kernels import explain
from inr_kernels.local_implicit import mlp

X, WEIGHTS, BIASES = torch.zeros(2, 5, 6), [torch.zeros(9, 6), torch.zeros(4, 9)], [torch.zeros(9), torch.zeros(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_torchs_layers(name, dtype):
    assert_kernel_as_accurate(Case(**CASES[name]), dtype)


def test_the_reference_is_torchs_layers():
    norm, first, last = nn.LayerNorm(6, eps=0.1), nn.Linear(6, 9), nn.Linear(9, 6)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 6)
    expected = x + nn.Sequential(norm, first, nn.GELU(), last)(x)
    weights, biases = [first.weight, last.weight], [first.bias, last.bias]
    out = mlp(x, weights, biases, norm_weight=norm.weight, norm_bias=norm.bias, eps=0.1, add=x)
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        out = mlp(x, weights, biases, norm_weight=norm.weight, norm_bias=norm.bias, eps=0.1, add=x, backend="cpu")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gelu(dtype):
    """Over all magnitudes, against float64: also where erfc is far below 1."""
    x = torch.cat([torch.linspace(-12, 12, 40_001), torch.logspace(-30, 30, 61), -torch.logspace(-30, 30, 61)])
    x = x.to(dtype)[:, None]
    one = torch.ones(1, 1, dtype=dtype)
    out = mlp(x, [one, one], backend="cpu")
    exact = x.double() * 0.5 * torch.special.erfc(-x.double() / 2**0.5)
    tail = exact.abs() < 1e-30  # e^x of the kernels is 0 there
    eps = torch.finfo(dtype).eps
    assert ((out - exact).abs()[~tail] <= (eps * 2 * x.double().abs() + 40 * eps * exact.abs())[~tail]).all()
    assert out[tail].abs().max() <= 1e-29


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_row(value, dtype):
    x, weights = torch.randn(40, 17, dtype=dtype), [torch.randn(n, k, dtype=dtype) for n, k in ((33, 17), (5, 33))]
    finite = mlp(x, weights, backend="cpu")
    for row in (0, 11, 12, 39):
        changed = x.clone()
        changed[row, 16] = value
        out = mlp(changed, weights, backend="cpu")
        others = torch.arange(40) != row
        torch.testing.assert_close(out[others], finite[others])  # not the same bits: on AMX by other instructions
        assert not out[row].isfinite().all()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_gradgradcheck(activation):
    case = Case(rows=(3,), widths=(4, 5, 2), norm=True, add=True, activation=activation)
    leaves = [t.requires_grad_() for t in case.tensors]

    def function(x, add, weight, bias, first, last, *biases):
        options = {"norm_weight": weight, "norm_bias": bias, "add": add, "activation": activation}
        return mlp(x, [first, last], biases, **options, backend="cpu")

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("terms", [256, 320, 1000])
def test_sums_of_numbers_of_one_sign(terms):
    """Their rounding errors add up the most, and torch adds them in many short sums where there are few outputs."""
    x, weight = torch.rand(1024, terms), torch.rand(3, terms)
    exact = x.double() @ weight.double().T
    errors = [mlp(x, [weight], backend=name) - exact for name in ("cpu", "reference")]
    ours, torchs = (error.norm() / exact.norm() for error in errors)
    assert ours <= 2 * torchs + 1e-7


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_norm_of_rows_far_from_0(offset):
    x, one = offset + torch.randn(50, 37).double(), torch.eye(37)
    norm = {"norm_weight": torch.ones(37)}
    exact = mlp(x.float().double(), [one.double()], norm_weight=norm["norm_weight"].double(), backend="reference")
    ours, torchs = (mlp(x.float(), [one], **norm, backend=name) for name in ("cpu", "reference"))
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6
    assert mlp(torch.full((1, 37), offset + 0.1), [one], **norm, backend="cpu").abs().max() < 1e-3


def test_gradients_of_some_inputs():
    """The others are not computed; those that are have the same values."""
    case = Case(rows=(5,), norm=True, add=True)
    everything = case.run(torch.float64, "cpu")[1:]
    x, add, weight, bias, *layers = case.tensors
    for i, tensor in enumerate(case.tensors):
        for other in case.tensors:
            other.requires_grad_(other is tensor)
        out = mlp(x, layers[:2], layers[2:], norm_weight=weight, norm_bias=bias, add=add, backend="cpu")
        torch.testing.assert_close(torch.autograd.grad(out, tensor, case.grad)[0], everything[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_backward_under_autocast(dtype):
    case = Case(rows=(5,), norm=True)
    expected = case.run(dtype, "cpu")
    x, _, weight, bias, *layers = (None if t is None else t.to(dtype).requires_grad_() for t in case.tensors)
    out = mlp(x, layers[:2], layers[2:], norm_weight=weight, norm_bias=bias, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (grad,) = torch.autograd.grad(out, x, case.grad.to(dtype))
    torch.testing.assert_close(grad, expected[1])


def test_threads_get_the_same_bits():
    x, weights = torch.randn(700, 30), [torch.randn(200, 30), torch.randn(30, 200)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mlp(x, weights, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_tensors_of_any_strides():
    x, weights, bias, add = torch.randn(5, 40, 12), torch.randn(40, 18), torch.randn(18), torch.randn(1, 12, 1)
    arguments = x.mT, weights.T[::2], bias[::2], add.expand(5, 12, 9)
    outs = []
    for x, weight, bias, add in (arguments, [t.contiguous() for t in arguments]):
        outs.append(mlp(x, [weight], [bias], add=add, backend="cpu"))
    assert torch.equal(*outs) and outs[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fast_half_precision_is_torchs(dtype, fast_half):
    x, weight = torch.randn(7, 6).to(dtype), torch.randn(9, 6).to(dtype)
    assert torch.equal(mlp(x, [weight]), nn.functional.linear(x, weight))
    with torch.autocast("cpu", dtype=dtype):
        assert mlp(x.float(), [weight]).dtype == dtype
    with pytest.raises(RuntimeError, match="cannot run mlp: it takes float32 and float64, and half"):
        mlp(x, [weight], backend="cpu")


def test_training_takes_torchs_layers():
    """They keep what the backward needs; the kernel would have to compute it again."""
    x, weight = torch.randn(7, 6), torch.randn(9, 6, requires_grad=True)
    assert "Linear" in type(mlp(x, [weight]).grad_fn).__name__ or "Addmm" in type(mlp(x, [weight]).grad_fn).__name__
    assert "mlp" in type(mlp(x, [weight], backend="cpu").grad_fn).__name__.lower()
    assert explain(mlp, x, [weight]).startswith("mlp on cpu, float32\n  cpu        runs  <- default")


BAD = {
    "x no tensor": ({"x": [1]}, TypeError, "x must be a torch.Tensor; got list"),
    "x without dimensions": (
        {"x": torch.zeros(())},
        ValueError,
        r"x must have a last dimension of at least 1; got \[\]",
    ),
    "x without channels": ({"x": X[..., :0]}, ValueError, "x must have a last dimension of at least 1"),
    "x of integers": ({"x": X.int()}, TypeError, "x must have a floating-point dtype; got torch.int32"),
    "weights a tensor": ({"weights": WEIGHTS[0]}, TypeError, "weights must be a sequence of tensors; got Tensor"),
    "no weights": ({"weights": [], "biases": []}, ValueError, "weights must have at least one entry; got none"),
    "weights none": ({"weights": [None, None]}, TypeError, r"weights\[0\] must be a torch.Tensor; got NoneType"),
    "weights do not fit x": (
        {"weights": WEIGHTS[::-1]},
        ValueError,
        r"weights\[0\] must have shape \[4, 6\]; got \[4, 9\]",
    ),
    "weights of three dimensions": ({"weights": [X, WEIGHTS[1]]}, ValueError, r"weights\[0\] must have 2 dimensions"),
    "weights of another dtype": (
        {"weights": [WEIGHTS[0], WEIGHTS[1].double()]},
        ValueError,
        r"weights\[1\] must have dtype torch.float32; got torch.float64",
    ),
    "weights without rows": ({"weights": [WEIGHTS[0][:0]], "biases": None}, ValueError, "at least one row"),
    "biases too few": ({"biases": BIASES[:1]}, ValueError, "biases must have as many entries as weights, 2; got 1"),
    "biases too many": ({"biases": BIASES * 2}, ValueError, "biases must have as many entries as weights, 2; got 4"),
    "biases do not fit": ({"biases": BIASES[::-1]}, ValueError, r"biases\[0\] must have shape \[9\]; got \[4\]"),
    "norm does not fit": ({"norm_weight": torch.ones(5)}, ValueError, r"norm_weight must have shape \[6\]; got \[5\]"),
    "norm's bias alone": ({"norm_bias": torch.ones(6)}, ValueError, "norm_bias must be given with norm_weight"),
    "add does not fit": ({"add": X}, ValueError, r"add must have shape \[2, 5, 4\]; got \[2, 5, 6\]"),
    "add on another device": ({"add": torch.zeros(2, 5, 4, device="meta")}, ValueError, "add must be on cpu; got meta"),
    "activation": ({"activation": "silu"}, ValueError, "activation must be one of relu, gelu; got 'silu'"),
    "activation None": ({"activation": None}, ValueError, "activation must be one of relu, gelu; got None"),
    "eps": ({"eps": -1}, ValueError, "eps must be a finite number of at least 0; got -1"),
    "backend": ({"backend": "fast"}, ValueError, "backend must be one of cpu, reference, triton"),
}


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name, backend):
    changes, error, text = BAD[name]
    with pytest.raises(error, match=text):
        mlp(**{"x": X, "weights": WEIGHTS, "biases": BIASES, "backend": backend} | changes)


def test_op_checks_bounds():
    op, rest = torch.ops.inr_kernels.mlp, (None, None, None, "gelu", 1e-5, "")
    op(X, WEIGHTS, BIASES, *rest)
    for wrong in (WEIGHTS[:1], [WEIGHTS[0], WEIGHTS[1][:, 1:]]):
        with pytest.raises(ValueError, match="must have"):
            op(X, wrong, BIASES, *rest)
    with pytest.raises(ValueError, match="must have"):
        op(X[..., 1:], WEIGHTS, BIASES, *rest)


def test_more_layers_than_the_kernel_takes():
    weights = [torch.randn(3, 3) for _ in range(65)]
    x = torch.randn(4, 3)
    assert torch.equal(mlp(x, weights), mlp(x, weights, backend="reference"))
    with pytest.raises(RuntimeError, match="it takes at most 64 layers; got 65"):
        mlp(x, weights, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_no_rows(backend):
    assert mlp(X[:0], WEIGHTS, BIASES, backend=backend).shape == (0, 5, 4)


@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck(gradients):
    case = Case(rows=(3, 5), norm=True, add=True)
    x, add, weight, bias, first, last, *biases = (t.requires_grad_(gradients) for t in case.tensors)
    arguments = x, [first, last], biases, weight, bias, add, "gelu", 1e-5, ""
    torch.library.opcheck(torch.ops.inr_kernels.mlp.default, arguments)


class Block(nn.Module):
    """The MLP of a transformer's block."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        weights, biases = [self.first.weight, self.last.weight], [self.first.bias, self.last.bias]
        return mlp(x, weights, biases, norm_weight=self.norm.weight, norm_bias=self.norm.bias, add=x)


def test_compile():
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8, 13):
        x = torch.randn(2, rows, 6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x))
        runs = [torch.autograd.grad(run(x).square().sum(), list(block.parameters())) for run in (block, compiled)]
        torch.testing.assert_close(*runs)


def test_export():
    block, args = Block(), (torch.rand(2, 5, 6),)
    with torch.no_grad():
        exported = torch.export.export(block, args).module()
        torch.testing.assert_close(exported(*args), block(*args))


def test_works_in_a_forked_child(in_a_fork):
    x, weights = torch.randn(300, 64), [torch.randn(512, 64), torch.randn(16, 512)]
    assert in_a_fork(lambda: mlp(x, weights, backend="cpu"))
