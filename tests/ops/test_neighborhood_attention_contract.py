"""neighborhood_attention apart from its values: errors, empty calls, the module, torch.compile, export, opcheck."""

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from neighborhood_attention_cases import Case
from op_backends import backends_of

import inr_kernels
from inr_kernels import (
    NeighborhoodAttention2D,
    explain,
    neighborhood_attention_2d,
    neighborhood_attention_2d_packed,
)
from inr_kernels._core.dispatch import OPS, always
from inr_kernels.neighborhood_attention.arguments import Facts

Q = torch.zeros(2, 6, 7, 2, 4)
RPB = torch.zeros(2, 5, 5)
BACKENDS = backends_of("neighborhood_attention")

# What is wrong -> changes to a good call, the error, and what its text must say.
BAD = {
    "query no tensor": ({"query": [1]}, TypeError, "query must be a torch.Tensor; got list"),
    "query integer": ({"query": Q.int()}, TypeError, "query must have a floating-point dtype; got torch.int32"),
    "query of 4 dimensions": ({"query": Q[0]}, ValueError, r"query must have 5 dimensions; got \[6, 7, 2, 4\]"),
    "no heads": (
        dict.fromkeys(("query", "key", "value"), Q[..., :0, :]),
        ValueError,
        "query must have at least one head",
    ),
    "no channels": (
        dict.fromkeys(("query", "key", "value"), Q[..., :0]),
        ValueError,
        "query must have at least one head",
    ),
    "another size": (
        {"key": Q[:, 1:]},
        ValueError,
        r"value must have key's height and width \[5, 7\]; got \[2, 6, 7, 2, 4\]",
    ),
    "a size that does not divide": (
        {"key": Q[:, 1:], "value": Q[:, 1:]},
        ValueError,
        r"key must have a height and a width that divide query's \[6, 7\], or equal kernel_size; got \[2, 5, 7, 2, 4\]",
    ),
    "another batch": (
        {"value": Q[:1]},
        ValueError,
        r"value must have query's batch 2 and a number of heads that divides its 2; got \[1, 6, 7, 2, 4\]",
    ),
    "more heads": (
        {"key": Q.repeat(1, 1, 1, 2, 1)},
        ValueError,
        "key must have query's batch 2 and a number of heads that divides its 2",
    ),
    "other channels": ({"key": Q[..., 1:]}, ValueError, "key must have query's 4 channels"),
    "values without channels": ({"value": Q[..., :0]}, ValueError, "value must have at least one head and one channel"),
    "values of several heads": ({"mean_heads": True}, ValueError, "value must have one head with mean_heads"),
    "mean_heads a number": ({"mean_heads": 1}, ValueError, "mean_heads must be a bool; got 1"),
    "another device": ({"key": Q.to("meta")}, ValueError, "key must be on cpu; got meta"),
    "another dtype": (
        {"value": Q.double()},
        ValueError,
        "value must have query's dtype torch.float32; got torch.float64",
    ),
    "K 0": ({"kernel_size": 0}, ValueError, "kernel_size must be a positive integer or a pair of them; got 0"),
    "three sides": ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size must be .* got \(3, 3, 3\)"),
    "a fraction": ({"kernel_size": 2.5}, ValueError, "kernel_size must be a positive integer"),
    "dilation 0": ({"dilation": (1, 0)}, ValueError, r"dilation must be a positive integer .* got \(1, 0\)"),
    "stride True": ({"stride": True}, ValueError, "stride must be a positive integer .* got True"),
    "stride above K": ({"stride": (4, 1)}, ValueError, r"stride must be at most kernel_size \(3, 3\); got \(4, 1\)"),
    "K above the map": (
        {"kernel_size": (3, 8)},
        ValueError,
        r"kernel_size must be at most \(6, 7\), the map's size, after multiplication by dilation \(1, 1\); got",
    ),
    "K x dilation above the map": ({"dilation": (3, 1)}, ValueError, r"by dilation \(3, 1\); got \(3, 3\)"),
    "no such causality": ({"is_causal": 1}, ValueError, "is_causal must be a bool or a pair of them; got 1"),
    "rpb no tensor": ({"rpb": 1.0}, TypeError, "rpb must be a torch.Tensor; got float"),
    "rpb of other heads": ({"rpb": RPB[:1]}, ValueError, r"rpb must have shape \[2, 5, 5\], .* got \[1, 5, 5\]"),
    "rpb of another K": ({"rpb": RPB[..., 1:]}, ValueError, r"rpb must have shape \[2, 5, 5\]"),
    "scale a tensor": ({"scale": torch.ones(1)}, ValueError, "scale must be a number or None"),
    "no such backend": ({"backend": "fast"}, ValueError, "backend must be one of cpu, reference, triton, cuda, natten"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changes, error, text = BAD[name]
    with pytest.raises(error, match=text):
        neighborhood_attention_2d(**{"query": Q, "key": Q, "value": Q, "kernel_size": 3} | changes)


def test_bad_packed_argument():
    for wrong in (Q, Q.unsqueeze(3), Q.unsqueeze(3).expand(-1, -1, -1, 4, -1, -1)):
        with pytest.raises(ValueError, match="qkv must have"):
            neighborhood_attention_2d_packed(wrong, 3)


# Position in the op's arguments, a wrong value, and what the error must say.
OUT_OF_BOUNDS = [
    (0, [Q, Q[:1], Q], "key must have query's batch 2"),
    (0, [Q, Q, Q[:, :3]], r"value must have key's height and width \[6, 7\]"),
    (0, [Q, Q[:, :4], Q[:, :4]], r"key must have a height and a width that divide query's \[6, 7\]"),
    (0, [Q, Q], "qkv must be one packed tensor or three; got 2"),
    (0, [Q], r"qkv must have shape \[B, L, 3, heads, dim\]"),
    (0, [Q, Q.half(), Q], "key must have query's dtype torch.float32; got torch.float16"),
    (1, RPB[:1], r"rpb must have shape \[2, 5, 5\]"),
    (1, RPB.double(), "rpb must have dtype torch.float32"),
    (2, [7, 3], r"kernel_size must be at most \(6, 7\)"),
    (2, [0, 3], "kernel_size must be a positive integer"),
    (2, [3], "kernel_size must be a positive integer or a pair of them"),
    (3, [3, 1], "kernel_size must be at most"),
    (4, [4, 1], r"stride must be at most kernel_size \(3, 3\)"),
    (4, [0, 1], "stride must be a positive integer"),
    (5, [True], "is_causal must be a bool or a pair of them"),
    (7, True, "value must have one head with mean_heads"),
]


@pytest.mark.parametrize(("position", "wrong", "text"), OUT_OF_BOUNDS)
def test_op_checks_bounds(position, wrong, text):
    op = torch.ops.inr_kernels.neighborhood_attention
    good = [[Q, Q, Q], RPB, [3, 3], [1, 1], [1, 1], [False, False], 1.0, False, ""]
    op(*good)
    with pytest.raises(ValueError, match=text):
        op(*good[:position], wrong, *good[position + 1 :])


def test_op_checks_gradients_and_lse():
    good = [[Q, Q, Q], RPB, [3, 3], [1, 1], [1, 1], [False, False], 1.0, False, ""]
    out, lse = torch.ops.inr_kernels.neighborhood_attention(*good)
    backward, needs = torch.ops.inr_kernels.neighborhood_attention_backward, [True] * 4
    backward(out, lse, lse, *good, needs)
    wrong = [((out[:1], lse, lse), "grad"), ((out, lse[:1], lse), "grad_lse"), ((out, lse, lse.double()), "lse")]
    for tensors, name in wrong:
        with pytest.raises(ValueError, match=f"^{name} must have"):
            backward(*tensors, *good, needs)
    with pytest.raises(ValueError, match="needs must have 4 values"):
        backward(out, lse, lse, *good, needs[1:])
    good[1] = None
    with pytest.raises(ValueError, match="needs must end with False if rpb is None"):
        backward(out, lse, lse, *good, needs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    qkv, rpb = torch.zeros(0, 6, 7, 3, 2, 4, requires_grad=True), RPB.clone().requires_grad_()
    out, lse = neighborhood_attention_2d_packed(qkv, 3, rpb=rpb, return_lse=True, backend=backend)
    assert out.shape == (0, 6, 7, 2, 4)
    assert lse.shape == (0, 6, 7, 2)
    grads = torch.autograd.grad(out.sum() + lse.sum(), [qkv, rpb])
    assert grads[0].shape == qkv.shape
    assert torch.equal(grads[1], RPB)


@pytest.mark.parametrize("needed", range(4))
def test_only_needed_gradients_are_computed(needed):
    case = Case(kernel_size=3, bias=True)
    tensors = [t.float() for t in (*case.tensors[0].unbind(3), case.tensors[1])]

    def grad_of(leaves, backend):
        out, lse = neighborhood_attention_2d(*leaves[:3], 3, rpb=leaves[3], return_lse=True, backend=backend)
        return torch.autograd.grad(out.square().sum() + lse.square().sum(), leaves[needed])[0]

    one = [t.clone().requires_grad_(i == needed) for i, t in enumerate(tensors)]
    full = [t.clone().requires_grad_() for t in tensors]
    assert torch.equal(grad_of(one, "cpu"), grad_of(full, "cpu"))
    torch.testing.assert_close(grad_of(one, "cpu"), grad_of(full, "reference"), rtol=1e-4, atol=1e-4)


def test_only_inputs_and_lse_are_saved_without_copies():
    qkv = torch.randn(1, 6, 7, 3, 2, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, lse = neighborhood_attention_2d_packed(qkv, 3, return_lse=True)
    assert [t.data_ptr() for t in saved] == [lse.data_ptr(), qkv.data_ptr()]
    grad = torch.autograd.grad(out.sum(), qkv)[0]
    assert grad.is_contiguous()


def test_second_derivative_raises():
    qkv = torch.randn(1, 4, 4, 3, 1, 2, requires_grad=True)
    out = neighborhood_attention_2d_packed(qkv, 3, backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="neighborhood_attention's kernels do not support second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_mixes_dtypes(dtype):
    q, k = torch.randn(1, 4, 5, 1, 2).to(dtype), torch.randn(1, 4, 5, 1, 2, requires_grad=True)
    rpb = torch.randn(1, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = neighborhood_attention_2d(q, k, q, 3, rpb=rpb, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    out.sum().backward()
    assert k.grad.dtype == rpb.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_bias_dtype(dtype):
    rpb = torch.randn(2, 5, 5, dtype=dtype, requires_grad=True)
    out = neighborhood_attention_2d(Q + 1, Q, Q + 2, 3, rpb=rpb)
    assert out.dtype == torch.float32
    assert torch.autograd.grad(out.sum(), rpb)[0].dtype == dtype


def arguments(packed=False, gradients=False, **options):
    case = Case(1, (5, 6), kernel_size=3, **options)
    qkv, rpb = case.tensors
    tensors = [qkv] if packed else [t.clone() for t in qkv.unbind(3)]
    tensors = [t.requires_grad_(gradients) for t in tensors]
    rpb = rpb if rpb is None else rpb.requires_grad_(gradients)
    return tensors, rpb, [3, 3], [1, 2], [2, 1], [False, True], 0.5, False, ""


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"packed": True}], ids=str)
def test_opcheck_forward(options, gradients):
    args = arguments(gradients=gradients, **options)
    torch.library.opcheck(torch.ops.inr_kernels.neighborhood_attention.default, args)


@pytest.mark.parametrize(
    ("bias", "needs"),
    [
        (True, [True, True, True, True]),
        (True, [True, False, False, False]),
        (True, [False, True, False, True]),
        (False, [True, True, True, False]),
    ],
)
def test_opcheck_backward(bias, needs):
    args = arguments(bias=bias)
    out, lse = torch.ops.inr_kernels.neighborhood_attention(*args)
    args = torch.randn_like(out), torch.randn_like(lse), lse, *args, needs
    torch.library.opcheck(torch.ops.inr_kernels.neighborhood_attention_backward.default, args)


class Block(torch.nn.Module):
    """The layer as in training."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.attention = NeighborhoodAttention2D(8, 2, 3, (1, 2), rel_pos_bias=True)

    def forward(self, x):
        return x + self.attention(self.norm(x))


def test_compile_trains():
    model, x = Block(), torch.randn(2, 5, 6, 8)
    compiled = torch.compile(model, fullgraph=True)
    runs = []
    for run in (model, compiled):
        out = run(x)
        runs.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for eager, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-5)


def test_compile_infers_with_other_shapes():
    model = Block()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((5, 6), (8, 9), (12, 7)):
            x = torch.randn(2, *size, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_export():
    model, x = Block(), torch.randn(2, 5, 6, 8)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_torch_func_and_forward_mode_use_the_reference():
    qkv, tangent = torch.randn(2, 3, 1, 4, 5, 1, 2, dtype=torch.float64)
    attend = lambda *qkv: neighborhood_attention_2d(*qkv, 3)  # noqa: E731
    _, forward = torch.func.jvp(attend, tuple(qkv), tuple(tangent))
    step = 1e-6
    numeric = (attend(*(qkv + step * tangent)) - attend(*(qkv - step * tangent))) / (2 * step)
    torch.testing.assert_close(forward, numeric, rtol=1e-6, atol=1e-7)
    batched = torch.func.vmap(attend)(*torch.randn(3, 4, 1, 4, 5, 1, 2))
    assert batched.shape == (4, 1, 4, 5, 1, 2)
    with pytest.raises(RuntimeError, match="backend 'cpu' does not support forward-mode AD"):
        torch.func.jvp(lambda *qkv: neighborhood_attention_2d(*qkv, 3, backend="cpu"), tuple(qkv), tuple(tangent))


def test_module_state_dicts():
    """NATTEN's own keys; old checkpoints have rpb."""
    assert list(NeighborhoodAttention2D(8, 2, qkv_bias=False).state_dict()) == [
        "qkv.weight",
        "proj.weight",
        "proj.bias",
    ]
    old = NeighborhoodAttention2D(8, 2, (3, 5), rel_pos_bias=True)
    assert {key: list(value.shape) for key, value in old.state_dict().items()} == {
        "rpb": [2, 5, 9],
        "qkv.weight": [24, 8],
        "qkv.bias": [24],
        "proj.weight": [8, 8],
        "proj.bias": [8],
    }
    assert "pad_small_inputs=True" in repr(NeighborhoodAttention2D(8, 2, pad_small_inputs=True))


def test_module_on_small_maps():
    x = torch.randn(1, 4, 9, 8)
    strict = NeighborhoodAttention2D(8, 2, 3, 2)
    with pytest.raises(ValueError, match=r"kernel_size must be at most \(4, 9\)"):
        strict(x)
    padding = NeighborhoodAttention2D(8, 2, 3, 2, pad_small_inputs=True)
    padding.load_state_dict(strict.state_dict())
    torch.testing.assert_close(padding(x), strict(F.pad(x, (0, 0, 0, 0, 0, 2)))[:, :4])
    large = torch.randn(1, 6, 9, 8)
    assert torch.equal(padding(large), strict(large))


def test_module_errors():
    with pytest.raises(ValueError, match="dim must be a multiple of 3 heads; got 8"):
        NeighborhoodAttention2D(8, 3)
    with pytest.raises(ValueError, match=r"x must have shape \[B, H, W, 8\]; got \[1, 9, 9, 4\]"):
        NeighborhoodAttention2D(8, 2)(torch.zeros(1, 9, 9, 4))


def test_explain_and_requested_backend(capsys, monkeypatch):
    text = explain(neighborhood_attention_2d, Q.bfloat16())
    assert capsys.readouterr().out.strip() == text
    assert text.startswith("neighborhood_attention on cpu, bfloat16\n  cpu        runs  <- default")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run neighborhood_attention: it takes CUDA tensors"):
        neighborhood_attention_2d(Q, Q, Q, 3, backend="triton")
    with inr_kernels.backend("reference"):
        assert torch.equal(neighborhood_attention_2d(Q, Q, Q, 3), Q)


def fake_natten(monkeypatch, kernels=True):
    """A module natten with NATTEN's signature and our arithmetic."""

    def na2d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, return_lse=False):
        options = {"dilation": dilation, "stride": stride, "is_causal": is_causal, "scale": scale}
        return neighborhood_attention_2d(query, key, value, kernel_size, **options, return_lse=return_lse)

    module = types.ModuleType("natten")
    module.__spec__ = types.SimpleNamespace(name="natten")
    module.na2d, module.HAS_LIBNATTEN = na2d, kernels
    monkeypatch.setitem(sys.modules, "natten", module)


def test_natten_on_request(monkeypatch):
    tensors = [torch.randn(1, 6, 7, 2, 4, requires_grad=True) for _ in range(3)]
    run = lambda **options: neighborhood_attention_2d(*tensors, 3, dilation=(2, 1), **options)  # noqa: E731
    if "natten" not in sys.modules:
        with pytest.raises(RuntimeError, match="cannot run neighborhood_attention: natten is not installed"):
            run(backend="natten")
    fake_natten(monkeypatch, kernels=False)
    with pytest.raises(RuntimeError, match="natten is installed without its kernels"):
        run(backend="natten")
    fake_natten(monkeypatch)
    with pytest.raises(RuntimeError, match="NATTEN's kernels take CUDA tensors"):
        run(backend="natten")


def test_natten_where_its_kernels_run(monkeypatch):
    fake_natten(monkeypatch)
    table = OPS["neighborhood_attention"].backends
    natten = table["natten"]
    assert natten.why_not(Facts(torch.device("cuda"), torch.float16)) == ""
    for wrong, text in (
        ({"rpb": True}, "no relative position bias"),
        ({"scale": 0.0}, "treats scale=0 as the default scale"),
    ):
        assert text in natten.why_not(Facts(torch.device("cuda"), torch.float16, **wrong))
    monkeypatch.setitem(table, "natten", dataclasses.replace(natten, why_not=always))
    tensors = [torch.randn(1, 6, 7, 2, 4, requires_grad=True) for _ in range(3)]
    options = {"dilation": (2, 1), "stride": 2, "is_causal": (False, True), "scale": 0.3, "return_lse": True}
    out, lse = neighborhood_attention_2d(*tensors, 3, **options, backend="natten")
    expected = neighborhood_attention_2d(*tensors, 3, **options)
    torch.testing.assert_close((out, lse), expected)
    assert out.requires_grad
    assert not lse.requires_grad  # NATTEN ignores its gradient


def test_works_in_a_forked_child(in_a_fork):
    qkv = torch.randn(1, 32, 32, 3, 2, 16)  # torch fills what is larger (poison) with threads that a child lacks
    assert in_a_fork(lambda: neighborhood_attention_2d_packed(qkv, 7, backend="cpu"))


def test_a_packed_tensor_is_two_dimensional():
    facts = [OPS["neighborhood_attention"].facts(t) for t in (Q, torch.stack((Q, Q, Q), 3))]
    assert facts[0] == facts[1]
