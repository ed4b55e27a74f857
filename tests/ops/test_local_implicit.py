"""The accuracy of local_implicit, against LIIF's own code and float64, on every backend that runs here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_implicit_cases import FLAGS, SHAPES, Case, assert_kernel_as_accurate
from op_backends import backends_of

from inr_kernels import LocalImplicitDecoder, local_implicit_decode
from inr_kernels.local_implicit import reference
from inr_kernels.local_implicit.functional.hoist import Form, convolve_as_matmuls, hoist_features

# Triton: test_local_implicit_triton.py
BACKENDS = [name for name in backends_of("local_implicit") if name != "triton"]
GOLDEN = [
    *(f"liif_u{u:d}e{e:d}c{c:d}" for u, e, c in FLAGS),
    *("liif_x1", "liif_x3", "liif_x4_random_out1", "liif_full256"),
]


def liif(arrays, dtype=torch.float32):
    """The arguments of local_implicit_decode from a golden file."""
    depth = sum(name.startswith("state.") and name.endswith(".weight") for name in arrays)
    weights, biases = (
        [arrays[f"state.imnet.layers.{2 * i}.{kind}"].to(dtype).requires_grad_() for i in range(depth)]
        for kind in ("weight", "bias")
    )
    unfold, ensemble, cell = map(bool, arrays["flags"])
    feat = arrays["feat"].to(dtype).requires_grad_()
    args = feat, arrays["coord"], arrays["cell"] if cell else None, weights, biases
    return args, {"feat_unfold": unfold, "local_ensemble": ensemble}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_output_equals_liifs(golden, name, backend):
    arrays = golden(name)
    args, flags = liif(arrays)
    out = local_implicit_decode(*args, **flags, backend=backend)
    assert (out - arrays["out"]).abs().max() <= 2e-6 * arrays["out"].abs().max()


def golden_gradients(arrays, depth):
    return [
        arrays["grad_feat"],
        *(arrays[f"grad.layers.{2 * i}.weight"] for i in range(depth)),
        *(arrays[f"grad.layers.{2 * i}.bias"] for i in range(depth)),
    ]


def gradients(arrays, backend, dtype=torch.float32):
    (feat, coord, cell, weights, biases), flags = liif(arrays, dtype)
    out = local_implicit_decode(feat, coord, cell, weights, biases, **flags, backend=backend)
    return torch.autograd.grad(out, [feat, *weights, *biases], arrays["grad_out"].to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n in GOLDEN if n != "liif_full256"])
def test_gradients_equal_liifs(golden, name, backend):
    arrays = golden(name)
    grads = gradients(arrays, backend)
    for grad, theirs in zip(grads, golden_gradients(arrays, len(grads) // 2), strict=True):
        assert (grad - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_gradients_at_a_relu_corner_are_closer_to_float64_than_liifs(golden):
    """In liif_full256, rounding in LIIF's float32 changes the sign of one hidden unit and so its gradient. Elsewhere
    the gradients agree to 1e-5."""
    arrays = golden("liif_full256")
    grads, truths = gradients(arrays, "cpu"), gradients(arrays, "reference", torch.float64)
    theirs = golden_gradients(arrays, len(grads) // 2)
    for grad, their, truth in zip(grads, theirs, truths, strict=True):
        error, allowed = (grad - truth).abs(), (their - truth).abs()
        assert (error <= allowed.clamp(min=1e-5 * truth.abs().max())).all()


BOTH_ENSEMBLES = [
    pytest.param(u, e, c, after, id=f"u{u:d}e{e:d}c{c:d}-{after}") for u, e, c in FLAGS for after in ("last", "first")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("unfold", "ensemble", "cell", "after"), BOTH_ENSEMBLES)
def test_as_accurate_as_eager(unfold, ensemble, cell, after, dtype):
    case = Case(feat_unfold=unfold, local_ensemble=ensemble, cell_decode=cell, ensemble_after=after)
    assert_kernel_as_accurate(case, dtype)


@pytest.mark.parametrize("after", ["last", "first"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_scales(name, after):
    case = Case(**SHAPES[name], ensemble_after=after)
    assert_kernel_as_accurate(case, torch.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    queries=st.integers(1, 70),
    hidden=st.lists(st.integers(1, 70), min_size=1, max_size=4).map(tuple),
    out=st.integers(1, 35),
    flags=st.sampled_from(FLAGS),
    after=st.sampled_from(["last", "first"]),
    grid=st.one_of(st.just(()), st.tuples(st.integers(1, 25), st.integers(1, 25))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_random_problems(batch, channels, size, queries, hidden, out, flags, after, grid, dtype):
    case = Case(batch, channels, size, queries, hidden, out, *flags, after, grid)
    assert_kernel_as_accurate(case, dtype)


@pytest.mark.parametrize("after", ["last", "first"])
def test_gradcheck_through_the_kernel(after):
    case = Case(batch=1, channels=2, size=(3, 4), queries=7, hidden=(6, 5), ensemble_after=after)
    feat, coord, cell, weights, biases = case.cast(torch.float64)
    leaves = [t.requires_grad_() for t in (feat, *weights, *biases)]

    def decode(feat, *params):
        n = len(params) // 2
        return local_implicit_decode(feat, coord, cell, params[:n], params[n:], ensemble_after=after, backend="cpu")

    assert torch.autograd.gradcheck(decode, leaves)


def test_gradgradcheck_through_the_reference():
    case = Case(batch=1, channels=1, size=(2, 3), queries=4, hidden=(4, 3))
    feat, coord, cell, weights, biases = case.cast(torch.float64)

    def decode(feat, weight):
        return local_implicit_decode(feat, coord, cell, [weight, *weights[1:]], biases, backend="reference")

    assert torch.autograd.gradgradcheck(decode, [feat.requires_grad_(), weights[0].requires_grad_()])


def test_kernels_raise_on_second_derivative():
    feat, coord, cell, weights, biases = Case().cast(torch.float32)
    out = local_implicit_decode(feat.requires_grad_(), coord, cell, weights, biases, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), feat, create_graph=True)
    with pytest.raises(RuntimeError, match="do not support second derivatives; use backend='reference'"):
        grad.sum().backward()


def test_gradient_of_the_coordinates_comes_from_the_reference():
    case = Case(queries=9)
    feat, coord, cell, weights, biases = case.cast(torch.float32)
    leaves = [coord.requires_grad_(), cell.requires_grad_()]
    ours, theirs = (
        torch.autograd.grad(decode(feat, coord, cell, weights, biases).square().sum(), leaves)
        for decode in (local_implicit_decode, reference.local_implicit)
    )
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(RuntimeError, match="backend 'cpu' does not compute the gradients of coord and cell"):
        local_implicit_decode(feat, coord, cell, weights, biases, backend="cpu")


def test_reads_past_a_row_stay_within_the_heap_allocation():
    """float64 on the generic kernels reads 32 columns in blocks of six; only the sanitized build notices an error."""
    assert_kernel_as_accurate(Case(hidden=(32, 32), queries=200), torch.float64)


@pytest.mark.parametrize("needed", ["feat", "weights"])
def test_only_needed_gradients_are_computed(needed):
    case = Case()
    feat, coord, cell, weights, biases = case.cast(torch.float32)
    leaves = [feat] if needed == "feat" else [*weights, *biases]
    for leaf in leaves:
        leaf.requires_grad_()
    out = local_implicit_decode(feat, coord, cell, weights, biases, backend="cpu")
    grads = torch.autograd.grad(out.sum(), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        eager = local_implicit_decode(feat, coord, cell, weights, biases, backend="reference")
        truth = torch.autograd.grad(eager.sum(), leaf)[0]
        assert (grad - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_backward_is_deterministic():
    case = Case(batch=3, size=(9, 8), queries=700, channels=8, hidden=(64, 64))
    runs = [case.decode(torch.float32, "cpu", gradients=True) for _ in range(4)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "strided coordinates"])
def test_memory_layouts(layout):
    case = Case(size=(6, 6))
    feat, coord, cell, weights, biases = case.cast(torch.float32)
    if layout == "channels_last":
        feat = feat.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        feat = feat.transpose(2, 3)
        weights = [weights[0].t().contiguous().t(), *weights[1:]]
    elif layout == "expanded":
        feat, coord, cell = (
            feat[:1].expand(2, -1, -1, -1),
            coord[:1].expand(2, -1, -1),
            cell[:, :1, :],
        )
        cell = cell.expand(-1, coord.shape[1], -1)
    else:
        coord = torch.stack((coord, coord + 1), -1)[..., 0]
        cell = cell.transpose(0, 1).contiguous().transpose(0, 1)
    out = local_implicit_decode(feat, coord, cell, weights, biases, backend="cpu")
    truth = local_implicit_decode(*(t.contiguous() for t in (feat, coord, cell)), weights, biases, backend="reference")
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-6)


def test_module_equals_the_function():
    decoder = LocalImplicitDecoder(4, out_channels=2, hidden=(9, 8), ensemble_after="first")
    feat, coord, cell = torch.randn(2, 4, 5, 6), torch.rand(2, 3, 7, 2), torch.rand(2, 2) / 9
    weights = [layer.weight for layer in decoder.imnet.layers if hasattr(layer, "weight")]
    biases = [layer.bias for layer in decoder.imnet.layers if hasattr(layer, "bias")]
    out = decoder(feat, coord, cell)
    assert out.shape == (2, 3, 7, 2)
    args = feat, coord, cell, weights, biases
    assert torch.equal(out, local_implicit_decode(*args, ensemble_after="first"))


def test_hoisting_as_matmuls_equals_the_convolution():
    for unfold, side in ((True, 3), (False, 1)):
        feat, bias = torch.randn(2, 5, 6, 7, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        kernel = torch.randn(4, 5, side, side, dtype=torch.float64)
        padded = torch.nn.functional.pad(feat, (0, 0, 1, 1)) if unfold else feat
        products = convolve_as_matmuls(padded, kernel, bias)
        convolution = hoist_features(feat, kernel.flatten(1), bias, Form(unfold))
        torch.testing.assert_close(products, convolution)


def test_forward_mode_and_torch_func_use_the_reference():
    feat, coord, cell, weights, biases = Case(queries=5).cast(torch.float64)
    tangent = torch.randn_like(feat)

    def decode(feat, backend=None):
        return local_implicit_decode(feat, coord, cell, weights, biases, backend=backend)

    (grad,) = torch.autograd.grad(decode(feat.requires_grad_()).sum(), feat)
    feat = feat.detach()
    _, moved = torch.func.jvp(decode, (feat,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = decode(torch.autograd.forward_ad.make_dual(feat, tangent))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, moved)
    torch.testing.assert_close(moved.sum(), (grad * tangent).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.func.grad(lambda f: decode(f).sum())(feat), grad, rtol=1e-6, atol=1e-9)
    with pytest.raises(RuntimeError, match="backend 'cpu' does not support forward-mode AD"):
        torch.func.jvp(lambda f: decode(f, "cpu"), (feat,), (tangent,))


def test_empty_calls():
    args = dict(zip(("feat", "coord", "cell", "weights", "biases"), Case().cast(torch.float32), strict=True))
    leaves = [args["feat"].requires_grad_(), *(t.requires_grad_() for t in args["weights"])]
    for empty in ({"coord": args["coord"][:, :0], "cell": args["cell"][:, :0]}, None):
        if empty is None:
            empty = {k: args[k][:0] for k in ("feat", "coord", "cell")}
        out = local_implicit_decode(**args | empty)
        assert out.shape == (*empty["coord"].shape[:2], 3)
        grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        assert all(g is None or not g.any() for g in grads)
