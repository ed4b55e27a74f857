"""neighborhood_attention of queries of another resolution than the keys: definition, forms, memory."""

import pytest
import torch
import torch.nn.functional as F
from neighborhood_attention_cases import Case
from op_backends import backends_of

from inr_kernels import explain, neighborhood_attention_2d

BACKENDS = [name for name in backends_of("neighborhood_attention") if name != "triton"]


def repeated(tensor, ratio):
    return tensor.repeat_interleave(ratio[0], 1).repeat_interleave(ratio[1], 2)


def random(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ratio", "options"),
    [
        ((2, 3), {"kernel_size": 3}),
        ((4, 4), {"kernel_size": (5, 3)}),
        ((1, 5), {"kernel_size": (4, 3), "dilation": (1, 2), "stride": (2, 1), "is_causal": (True, False)}),
        ((3, 2), {"kernel_size": 3, "dilation": 2, "stride": 3}),
    ],
)
def test_equals_repeated_keys_with_a_dilation(ratio, options, backend):
    """As NAF and AnyUp compute it: keys and values upsampled to the queries' size, with a dilation of the ratio."""
    q, k, v = random((2, 7 * ratio[0], 6 * ratio[1], 2, 4), (2, 7, 6, 2, 4), (2, 7, 6, 2, 5))
    out, lse = neighborhood_attention_2d(q, k, v, **options, return_lse=True, backend=backend)
    dilation = options.get("dilation", 1)
    dilation = (dilation, dilation) if isinstance(dilation, int) else dilation
    large = options | {"dilation": tuple(r * d for r, d in zip(ratio, dilation, strict=True))}
    expected = neighborhood_attention_2d(
        q, repeated(k, ratio), repeated(v, ratio), **large, return_lse=True, backend="reference"
    )
    torch.testing.assert_close((out, lse), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_at_low_resolution(backend):
    """start_y = clamp(y // r_y - K // 2, 0, Hk - K), shown by one-hot values under equal scores."""
    kernel, keys, ratio = 3, 6, 4
    q, k = torch.zeros(1, keys * ratio, 1, 1, 2), torch.zeros(1, keys, 1, 1, 2)
    out = neighborhood_attention_2d(q, k, torch.eye(keys).view(1, keys, 1, 1, keys), (kernel, 1), backend=backend)
    for y, row in enumerate(out.view(keys * ratio, keys)):
        start = min(max(y // ratio - kernel // 2, 0), keys - kernel)
        assert row.nonzero().flatten().tolist() == list(range(start, start + kernel))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [((5, 7), (3, 4)), ((1, 3), (4, 6))], ids=str)
def test_window_of_all_keys_is_dense_attention(sizes, backend):
    (height, width), keys = sizes
    q, k, v = random((2, height, width, 2, 8), (2, *keys, 2, 8), (2, *keys, 2, 3))
    out = neighborhood_attention_2d(q, k, v, keys, backend=backend)
    dense = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
    torch.testing.assert_close(out.flatten(1, 2), dense.transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [1, 3])
def test_mean_of_heads(ratio, backend):
    q, k, v = random((1, 6 * ratio, 5 * ratio, 4, 3), (1, 6, 5, 4, 3), (1, 6, 5, 1, 9))
    out = neighborhood_attention_2d(q, k, v, 3, mean_heads=True, backend=backend)
    expected = neighborhood_attention_2d(q, k, v.expand(-1, -1, -1, 4, -1), 3, backend="reference").mean(3)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"size": (6, 4), "key_size": (3, 2), "kernel_size": 2, "bias": True},
        {"size": (4, 6), "key_size": (4, 2), "kernel_size": (3, 1), "shared": (1, 2), "dim_v": 3},
        {"size": (4, 6), "key_size": (2, 3), "kernel_size": 2, "shared": (2, 1), "mean_heads": True, "bias": True},
        {"size": (3, 4), "kernel_size": 3, "shared": (1, 1), "dim_v": 1},
    ],
    ids=str,
)
def test_gradcheck_through_the_kernel(options):
    case = Case(1, heads=2, dim=2, **options)
    leaves = [t.clone().requires_grad_() for t in (*case.separate(), case.tensors[1]) if t is not None]

    def attend(*leaves):
        rpb = leaves[3] if case.bias else None
        return neighborhood_attention_2d(
            *leaves[:3], case.kernel_size, rpb=rpb, **case.options(), return_lse=True, backend="cpu"
        )

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("mean_heads", [False, True])
def test_deterministic_for_any_number_of_threads(mean_heads):
    options = {"size": (120, 80), "key_size": (60, 20), "shared": (2, 1), "dim_v": 30, "mean_heads": mean_heads}
    case = Case(batch=1, heads=2, dim=16, kernel_size=(7, 5), bias=True, **options)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 5, 5):
        torch.set_num_threads(threads)
        runs.append(case.run(torch.float32, "cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("needed", range(3))
@pytest.mark.parametrize("mean_heads", [False, True])
def test_only_needed_gradients_are_computed(needed, mean_heads):
    case = Case(size=(12, 15), key_size=(4, 5), heads=2, shared=(2, 1), mean_heads=mean_heads)
    tensors = [t.float() for t in case.separate()]

    def grad_of(leaves):
        out = neighborhood_attention_2d(*leaves, 3, mean_heads=mean_heads, backend="cpu")
        return torch.autograd.grad(out.square().sum(), leaves[needed])[0]

    one = grad_of([t.clone().requires_grad_(i == needed) for i, t in enumerate(tensors)])
    assert torch.equal(one, grad_of([t.clone().requires_grad_() for t in tensors]))


@pytest.mark.parametrize(
    "options", [{"key_size": (4, 3), "shared": (1, 2), "dim_v": 5}, {"mean_heads": True, "shared": (2, 1)}], ids=str
)
def test_opcheck(options):
    case = Case(1, (8, 6), 2, 3, 2, **options)
    tensors = [t.clone().requires_grad_() for t in case.separate()]
    arguments = tensors, None, [2, 2], [1, 1], [1, 1], [False, False], 0.5, case.mean_heads, ""
    torch.library.opcheck(torch.ops.inr_kernels.neighborhood_attention.default, arguments)
    out, lse = (t.detach() for t in torch.ops.inr_kernels.neighborhood_attention(*arguments))
    tensors = [t.detach() for t in tensors]
    arguments = torch.randn_like(out), torch.randn_like(lse), lse, tensors, *arguments[1:], [True, True, True, False]
    torch.library.opcheck(torch.ops.inr_kernels.neighborhood_attention_backward.default, arguments)


def test_explain_names_the_forms(capsys):
    q, k, v = random((1, 8, 8, 4, 4), (1, 4, 4, 4, 4), (1, 4, 4, 1, 96))
    assert "cpu        runs  <- default" in explain(neighborhood_attention_2d, q, k, v, 3, mean_heads=True)
    assert capsys.readouterr().out


@pytest.mark.parametrize("mean_heads", [False, True])
def test_memory_at_ratio_16(run_python, mean_heads):
    """Upsampled keys and values would take 256 times their memory, here 160 MB and 640 MB."""
    code = f"""if True:
        import resource, torch
        from inr_kernels import neighborhood_attention_2d
        torch.set_num_threads(1)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def attend(size):
            q, k = torch.randn(1, 16 * size, 16 * size, 2, 32), torch.randn(1, size, size, 2, 32)
            v = torch.randn(1, size, size, {1 if mean_heads else 2}, 64)
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out = neighborhood_attention_2d(*leaves, 7, mean_heads={mean_heads}, backend="cpu")
            forward = peak()
            grad = torch.ones_like(out)
            grads = torch.autograd.grad(out, leaves, grad)
            megabytes = lambda *tensors: sum(t.numel() for t in tensors) / 2**18
            return forward, megabytes(*leaves, out), megabytes(grad, *grads)
        attend(7)
        start = peak()
        forward, tensors, grads = attend(40)
        print(forward - start - tensors, peak() - start - tensors - grads)
    """
    forward, both = map(float, run_python(code).split())
    assert forward < 16, "megabytes besides inputs and outputs"
    assert both < 24
