"""The accuracy of neighborhood_attention, against NATTEN and float64, on every backend that runs here."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_attention_cases import SHAPES, Case, assert_kernel_as_accurate
from op_backends import backends_of

import inr_kernels
from inr_kernels import NeighborhoodAttention2D, neighborhood_attention_2d, neighborhood_attention_2d_packed
from inr_kernels.neighborhood_attention import reference

# Triton: test_neighborhood_attention_triton.py
BACKENDS = [name for name in backends_of("neighborhood_attention") if name != "triton"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NATTEN = ["k7", "k7x5", "k_full", "k3d2_odd", "k5d3", "even_k4", "stride", "causal"]


def close(ours, theirs):
    return (ours - theirs).abs().max() <= 1e-6 * max(1, theirs.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NATTEN)
def test_equals_natten(golden, name, backend):
    arrays = golden(f"natten_{name}")
    options = {key: arrays[key].tolist() for key in ("kernel_size", "dilation", "stride", "is_causal")}
    tensors = (arrays[key] for key in "qkv")
    out, lse = neighborhood_attention_2d(*tensors, **options, return_lse=True, backend=backend)
    assert close(out, arrays["out"])
    assert close(lse, arrays["lse"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["k3", "k5d2", "k7"])
def test_equals_natten_with_bias(golden, name, backend):
    arrays = golden(f"natten_rpb_{name}")
    leaves = [arrays[key].requires_grad_() for key in ("q", "k", "v", "rpb")]
    options = {key: arrays[key].tolist() for key in ("kernel_size", "dilation")}
    out = neighborhood_attention_2d(*leaves[:3], **options, rpb=leaves[3], backend=backend)
    assert close(out, arrays["out"])
    for grad, key in zip(torch.autograd.grad(out, leaves, arrays["grad_out"]), ("q", "k", "v", "rpb"), strict=True):
        assert close(grad, arrays[f"grad_{key}"]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_nattens_module(golden, backend):
    arrays = golden("natten_module")
    module = NeighborhoodAttention2D(32, int(arrays["num_heads"]), int(arrays["kernel_size"]), int(arrays["dilation"]))
    module.load_state_dict({key[6:]: value for key, value in arrays.items() if key.startswith("state.")})
    with inr_kernels.backend(backend):
        assert close(module(arrays["x"]), arrays["out"])


def seen(length, kernel_size, dilation, stride, is_causal):
    """The set of keys of each query, computed one by one from the rule in the docstring."""
    for query in range(length):
        residue, j = query % dilation, query // dilation
        n = math.ceil((length - residue) / dilation)
        if is_causal:
            lead = min(j // stride * stride + stride - 1, n - 1)
            start, end = max(lead - kernel_size + 1, 0), j + 1
        else:
            lead = min(j // stride * stride + stride // 2, n - 1)
            start = min(max(lead - kernel_size // 2, 0), n - kernel_size)
            end = start + kernel_size
        yield {residue + dilation * t for t in range(start, end)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", [0, 1])
def test_windows(axis, backend):
    """With equal scores and one-hot values, the output shows the keys in the window of each query."""
    for length, k, d, s, causal in itertools.product((5, 12, 19), (1, 2, 3, 5), (1, 2, 3), (1, 2, 3), (False, True)):
        if k * d > length or s > k:
            continue
        keys, mask = reference.window(length, k, d, s, causal)
        expected = list(seen(length, k, d, s, causal))
        assert [set(row[on].tolist()) for row, on in zip(keys, mask, strict=True)] == expected
        value = torch.eye(length)[None, :, None] if axis == 0 else torch.eye(length)[None, None]
        pair = lambda along, across: (along, across) if axis == 0 else (across, along)  # noqa: E731
        out = neighborhood_attention_2d(
            *(torch.zeros_like(value).unsqueeze(3),) * 2,
            value.unsqueeze(3),
            pair(k, 1),
            dilation=pair(d, 1),
            stride=pair(s, 1),
            is_causal=pair(causal, False),
            backend=backend,
        )
        assert [set(row.nonzero().flatten().tolist()) for row in out.view(length, length)] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_map_is_dense_attention(backend):
    query, key, value = torch.randn(3, 2, 5, 6, 2, 8)
    out = neighborhood_attention_2d(query, key, value, (5, 6), backend=backend)
    dense = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)))
    torch.testing.assert_close(out.flatten(1, 2), dense.transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_of_the_kernel_is_blocked_attention(backend):
    query, key, value = torch.randn(3, 1, 8, 6, 2, 4)
    out = neighborhood_attention_2d(query, key, value, (4, 3), stride=(4, 3), backend=backend)
    block = slice(4, 8), slice(3, 6)
    whole = neighborhood_attention_2d(*(t[:, block[0], block[1]] for t in (query, key, value)), (4, 3))
    torch.testing.assert_close(out[:, block[0], block[1]], whole)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_eager(dtype, name):
    assert_kernel_as_accurate(Case(**SHAPES[name]), dtype, "cpu")
    assert_kernel_as_accurate(Case(**SHAPES[name], bias=True), dtype, "cpu")


# Long rows, which the C++ divides into segments of at least 16 vectors: whole and short last ones, windows and
# dilations that reach over several, axes before the row.
LONG_ROWS = [
    {"size": (1, 1031), "kernel_size": (1, 7)},
    {"size": (1, 1024), "kernel_size": (1, 9), "heads": 4, "shared": (2, 1), "dim": 5, "dim_v": 19},
    {"size": (1, 1025), "kernel_size": (1, 6), "dilation": (1, 5), "stride": (1, 4)},
    {"size": (1, 1023), "kernel_size": (1, 4), "dilation": (1, 64), "is_causal": (False, True)},
    {"size": (1, 770), "kernel_size": (1, 25), "dilation": (1, 30), "dim": 3},
    {"size": (1, 1100), "kernel_size": (1, 401), "heads": 1, "dim": 3},
    {"size": (3, 777), "kernel_size": (2, 5), "heads": 1, "dilation": (1, 2)},
    {"size": (2, 3, 601), "kernel_size": (2, 2, 3), "heads": 1, "dim": 3, "stride": (1, 1, 2)},
]


@pytest.mark.parametrize("options", LONG_ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_accurate_as_eager_on_long_rows(dtype, options):
    assert_kernel_as_accurate(Case(batch=1, bias=True, **options), dtype, "cpu")


@st.composite
def cases(draw, largest=40):
    axes, rank = [], draw(st.sampled_from([2, 2, 3]))
    largest = largest if rank == 2 else 8
    for _ in range(rank):
        kernel_size = draw(st.integers(1, 7 if rank == 2 else 4))
        dilation = draw(st.integers(1, 4 if rank == 2 else 2))
        length = draw(st.integers(kernel_size * dilation, max(largest, kernel_size * dilation)))
        axes.append((kernel_size, dilation, draw(st.integers(1, kernel_size)), draw(st.booleans()), length))
    kernel_size, dilation, stride, is_causal, size = zip(*axes, strict=True)
    heads = draw(st.integers(1, 4))
    options = {}
    if draw(st.booleans()):
        layouts = ["contiguous", "heads first", "dim first"] + ["packed"] * (rank == 2)
        options["layout"] = draw(st.sampled_from(layouts))
    else:
        ratios = [1, 1, 2, 3, 4, 5] if rank == 2 else [1]
        ratio = [draw(st.sampled_from(ratios)) if length < 20 else 1 for length in size]
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        options["key_size"], size = size, tuple(n * r for n, r in zip(size, ratio, strict=True))
        options["mean_heads"] = rank == 2 and draw(st.booleans())
        heads_v = 1 if options["mean_heads"] else draw(st.sampled_from(divisors))
        options["shared"] = draw(st.sampled_from(divisors)), heads_v
        options["dim_v"] = draw(st.integers(1, 40))
    return Case(
        batch=draw(st.integers(1, 2)),
        size=size,
        heads=heads,
        dim=draw(st.integers(1, 20)),
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        is_causal=is_causal,
        bias=draw(st.booleans()),
        **options,
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_random_problems(case, dtype):
    assert_kernel_as_accurate(case, dtype, "cpu")


@pytest.mark.parametrize("options", [{}, {"stride": 2, "is_causal": (True, False), "dilation": (1, 2)}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "packed"])
def test_gradcheck_through_the_kernel(options, layout):
    case = Case(1, (4, 6), 2, 3, (3, 3), bias=True, **options)
    qkv, rpb = case.tensors
    options = case.options() | {"return_lse": True, "backend": "cpu"}
    if layout == "packed":
        attend = lambda qkv, rpb: neighborhood_attention_2d_packed(qkv, 3, rpb=rpb, **options)  # noqa: E731
        assert torch.autograd.gradcheck(attend, (qkv.requires_grad_(), rpb.requires_grad_()))
    else:
        attend = lambda q, k, v, rpb: neighborhood_attention_2d(q, k, v, 3, rpb=rpb, **options)  # noqa: E731
        leaves = [t.clone().requires_grad_() for t in (*qkv.unbind(3), rpb)]
        assert torch.autograd.gradcheck(attend, leaves)


def test_gradgradcheck_through_the_reference():
    case = Case(1, (3, 4), 1, 2, 2, is_causal=(True, False), bias=True)
    leaves = [t.clone().requires_grad_() for t in (*case.tensors[0].unbind(3), case.tensors[1])]

    def attend(q, k, v, rpb):
        options = case.options() | {"return_lse": True, "backend": "reference"}
        return neighborhood_attention_2d(q, k, v, 2, rpb=rpb, **options)

    assert torch.autograd.gradgradcheck(attend, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend):
    query, key, value = torch.randn(3, 1, 6, 7, 1, 4)
    query[0, 2, 3] = 1e4
    key[0, 3, 3] = -1e4
    out, lse = neighborhood_attention_2d(query, key, value, 3, return_lse=True, backend=backend)
    truth = neighborhood_attention_2d(
        query.double(), key.double(), value.double(), 3, return_lse=True, backend="reference"
    )
    for ours, exact in zip((out, lse), truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", range(3))
def test_nan_and_infinity_stay_in_their_neighbourhood(which, backend):
    for bad in (math.nan, math.inf):
        tensors = [torch.randn(1, 9, 23, 1, 3) for _ in range(3)]
        tensors[which][0, 4, 11, 0, 1] = bad
        for t in tensors:
            t.requires_grad_()
        out = neighborhood_attention_2d(*tensors, 3, backend=backend)
        wrong = ~out.isfinite().all(-1)[0, :, :, 0]
        rows, cols = (range(4, 5), range(11, 12)) if which == 0 else (range(3, 6), range(10, 13))
        inside = torch.zeros_like(wrong)
        inside[rows.start : rows.stop, cols.start : cols.stop] = True
        assert wrong.any()
        assert not (wrong & ~inside).any()
        grads = torch.autograd.grad(out[inside[None, :, :, None]].nansum(), tensors)
        for grad in grads:  # outside the windows of these queries
            assert grad[:, :1].isfinite().all()
            assert grad[:, :, :8].isfinite().all()


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("position", [0, 63, 64, 511, 512, 999])
def test_nan_and_infinity_stay_in_their_neighbourhood_of_a_long_row(position, which):
    """The kernel uses its memory again for every segment of a row, so that some of it holds the other segments'."""
    for bad in (math.nan, math.inf):
        tensors = [torch.rand(1, 1, 1000, 1, 3) for _ in range(3)]  # positive: no infinite score is negative
        tensors[which][0, 0, position, 0, 1] = bad
        for t in tensors:
            t.requires_grad_()
        out = neighborhood_attention_2d(*tensors, (1, 5), dilation=(1, 3), backend="cpu")
        windows = list(seen(1000, 5, 3, 1, False))
        near = [query for query, keys in enumerate(windows) if (query == position if which == 0 else position in keys)]
        wrong = ~out.isfinite().all(-1).flatten()
        assert wrong.any()
        assert set(wrong.nonzero().flatten().tolist()) <= set(near)
        grads = torch.autograd.grad(out[0, 0, near].nansum(), tensors)
        far = torch.ones(1000, dtype=torch.bool)
        far[sorted(set().union(near, *(windows[query] for query in near)))] = False
        for grad in grads:
            assert grad[0, 0, far].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"size": (90, 70), "kernel_size": (7, 5), "dilation": (2, 1), "dim": 6},
        {"size": (1, 3000), "kernel_size": (1, 101), "dim": 16},  # enough work for 4 threads, in several segments
    ],
    ids=str,
)
def test_deterministic_for_any_number_of_threads(options):
    case = Case(batch=1, heads=1, bias=True, **options)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 5, 5):
        torch.set_num_threads(threads)
        runs.append(case.run(torch.float32, "cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
