"""neighborhood_attention in three dimensions: definition, gradients, options, layer; accuracy is in the other files."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from neighborhood_attention_cases import Case
from op_backends import backends_of

from inr_kernels import (
    NeighborhoodAttention1D,
    NeighborhoodAttention3D,
    merge_attentions,
    neighborhood_attention_2d,
    neighborhood_attention_3d,
)
from inr_kernels.neighborhood_attention import reference
from inr_kernels.neighborhood_attention.arguments import shape_facts

BACKENDS = [name for name in backends_of("neighborhood_attention") if name != "triton"]
SIZE = 4, 5, 6
WINDOW = {"kernel_size": (3, 2, 4), "dilation": (1, 2, 1), "stride": (2, 1, 3), "is_causal": (True, False, False)}


def random(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def seen(size, kernel_size, dilation, stride, is_causal):
    """[N, N] bool: whether a query sees a key; the product of one mask per axis."""
    whole = torch.ones(1, 1, dtype=torch.bool)
    for axis in zip(size, kernel_size, dilation, stride, is_causal, strict=True):
        keys, visible = reference.window(*axis)
        mask = torch.zeros(axis[0], axis[0], dtype=torch.bool)
        for query, key in itertools.product(range(axis[0]), range(axis[1])):
            mask[query, keys[query, key]] |= visible[query, key]
        whole = torch.kron(whole.int(), mask.int()).bool()
    return whole


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_dense_attention_under_a_mask(backend):
    q, k, v = leaves = random((2, *SIZE, 4, 3), (2, *SIZE, 2, 3), (2, *SIZE, 1, 5))
    out, lse = neighborhood_attention_3d(q, k, v, **WINDOW, return_lse=True, backend=backend)
    tokens = [t.flatten(1, 3).movedim(2, 1).repeat_interleave(4 // t.shape[-2], 1) for t in leaves]
    mask = seen(SIZE, **WINDOW)
    scores = (tokens[0] @ tokens[1].mT * 3**-0.5).masked_fill(~mask, -torch.inf)
    dense = F.scaled_dot_product_attention(*tokens, attn_mask=mask).movedim(1, 2).unflatten(1, SIZE)
    torch.testing.assert_close((out, lse), (dense, scores.logsumexp(-1).mT.unflatten(1, SIZE)))
    grads = [torch.autograd.grad(t.sin().sum(), leaves) for t in (out, dense)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_volume_with_one_pixel_along_an_axis_is_a_map(axis, backend):
    q, k, v, rpb = random(*[(1, 5, 6, 2, 3)] * 3, (2, 5, 3))
    options = {"scale": 0.4, "return_lse": True, "backend": backend}
    kernel, stride = [3, 2], [2, 1]
    expected = neighborhood_attention_2d(q, k, v, kernel, stride=stride, rpb=rpb, **options)
    for values in (kernel, stride):
        values.insert(axis - 1, 1)
    volumes = [t.unsqueeze(axis) for t in (q, k, v)]
    out, lse = neighborhood_attention_3d(*volumes, kernel, stride=stride, rpb=rpb.unsqueeze(axis), **options)
    torch.testing.assert_close((out.squeeze(axis), lse.squeeze(axis)), expected)
    leaves = [q, k, v, rpb]
    grads = [torch.autograd.grad(o.sin().sum() + s.sum(), leaves) for o, s in ((out, lse), expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", [{"bias": True}, {"heads": 2, "shared": (1, 2), "dim_v": 3}], ids=str)
def test_gradcheck_through_the_kernel(options):
    case = Case(**{"batch": 1, "size": (3, 2, 4), "heads": 1, "dim": 2, "kernel_size": (2, 2, 3)} | options)
    rpb = case.tensors[1]
    leaves = [t.clone().requires_grad_() for t in (*case.separate(), *([] if rpb is None else [rpb]))]

    def attend(q, k, v, rpb=None):
        return neighborhood_attention_3d(
            q, k, v, case.kernel_size, is_causal=(True, False, False), rpb=rpb, return_lse=True, backend="cpu"
        )

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("needed", [0, 1, 2, 3])
def test_only_needed_gradients(needed):
    tensors = [t.detach() for t in random(*[(1, 3, 4, 3, 2, 2)] * 3, (2, 3, 3, 3))]
    tensors[needed].requires_grad_()
    q, k, v, rpb = tensors
    grads = []
    for backend in BACKENDS:
        out = neighborhood_attention_3d(q, k, v, 2, rpb=rpb, backend=backend)
        grads += torch.autograd.grad(out.square().sum(), tensors[needed])
    torch.testing.assert_close(*grads)


def test_deterministic_for_any_number_of_threads():
    case = Case(batch=1, heads=2, size=(9, 30, 20), dim=6, kernel_size=(3, 5, 3), dilation=(2, 1, 1), bias=True)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 5, 5):
        torch.set_num_threads(threads)
        runs.append(case.run(torch.float32, "cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_and_additional_keys(backend):
    q, k, v, more_k, more_v = random(*[(2, *SIZE, 2, 3)] * 3, *[(2, 7, 2, 3)] * 2)
    mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[1, 2:] = True
    options = {"return_lse": True, "backend": backend}
    out, lse = neighborhood_attention_3d(q, k, v, (4, 3, 3), key_padding_mask=mask, **options)
    small = neighborhood_attention_3d(*(t[1:, :2] for t in (q, k, v)), (2, 3, 3), **options)
    torch.testing.assert_close((out[1:, :2], lse[1:, :2]), small)
    joined, _ = neighborhood_attention_3d(
        q, k, v, (4, 3, 3), key_padding_mask=mask, additional_keys=more_k, additional_values=more_v, **options
    )
    far = F.scaled_dot_product_attention(*(t.movedim(2, 1) for t in (q.flatten(1, 3), more_k, more_v)))
    scores = torch.einsum("bnhd,blhd->bnhl", q.flatten(1, 3), more_k) * 3**-0.5
    parts = [out, far.movedim(1, 2).view_as(out)], [lse, scores.logsumexp(-1).view_as(lse)]
    torch.testing.assert_close(joined, merge_attentions(*parts)[0])


def test_opcheck():
    q, k, v, rpb = random(*[(1, 3, 4, 3, 2, 2)] * 3, (2, 3, 3, 3))
    ones = [1, 1, 1]
    arguments = [q, k, v], rpb, [2, 2, 2], ones, ones, [0, 1, 0], 0.5, False, "cpu"
    torch.library.opcheck(torch.ops.inr_kernels.neighborhood_attention.default, arguments)


def test_the_form_has_verdicts_of_its_own():
    q = torch.zeros(1, *SIZE, 2, 4)
    assert shape_facts(q, q, q, False, None, False).form == "head to 32, 3-D"


Q = torch.zeros(1, *SIZE, 2, 4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"query": Q[0]}, r"query must have 6 dimensions; got \[4, 5, 6, 2, 4\]"),
        ({"kernel_size": (3, 3)}, r"kernel_size must be a positive integer or three of them; got \(3, 3\)"),
        ({"kernel_size": 5}, r"kernel_size must be at most \(4, 5, 6\), the map's size, after multiplication"),
        ({"is_causal": (True,)}, r"is_causal must be a bool or three of them; got \(True,\)"),
        (
            {"key": Q[:, :2], "value": Q[:, :2], "kernel_size": 2},
            r"key must have query's size \[4, 5, 6\] in three dimensions; got \[1, 2, 5, 6, 2, 4\]",
        ),
        (
            {"value": Q[:, 1:]},
            r"value must have key's depth, height and width \[4, 5, 6\]; got \[1, 3, 5, 6, 2, 4\]",
        ),
        (
            {"rpb": torch.zeros(2, 5, 5, 4)},
            r"rpb must have shape \[2, 5, 5, 5\], \[heads, 2 Kd - 1, 2 Kh - 1, 2 Kw - 1\]; got \[2, 5, 5, 4\]",
        ),
        (
            {"key_padding_mask": torch.zeros(1, 4, 5, dtype=torch.bool)},
            r"key_padding_mask must have 4 dimensions; got \[1, 4, 5\]",
        ),
    ],
)
def test_bad_argument(changes, text):
    with pytest.raises(ValueError, match=text):
        neighborhood_attention_3d(**{"query": Q, "key": Q, "value": Q, "kernel_size": 3} | changes)


def test_module_3d():
    layer = NeighborhoodAttention3D(8, 2, (2, 3, 3), (1, 2, 1), rel_pos_bias=True, pad_small_inputs=True)
    assert {key: list(value.shape) for key, value in layer.state_dict().items()} == {
        "rpb": [2, 3, 5, 5],
        "qkv.weight": [24, 8],
        "qkv.bias": [24],
        "proj.weight": [8, 8],
        "proj.bias": [8],
    }
    x = torch.randn(2, 3, 5, 4, 8)
    q, k, v = layer.qkv(F.pad(x, (0, 0, 0, 0, 0, 1))).unflatten(-1, (3, 2, 4)).unbind(-3)
    out = neighborhood_attention_3d(q, k, v, (2, 3, 3), dilation=(1, 2, 1), rpb=layer.rpb)
    torch.testing.assert_close(layer(x), layer.proj(out[:, :, :5].flatten(-2)))
    with pytest.raises(ValueError, match=r"x must have shape \[B, D, H, W, 8\]; got \[1, 3, 5, 4, 4\]"):
        layer(torch.zeros(1, 3, 5, 4, 4))
    assert "kernel_size=(2, 3, 3), dilation=(1, 2, 1), pad_small_inputs=True" in repr(layer)
    assert repr(NeighborhoodAttention1D(8, 2, 3)).startswith("NeighborhoodAttention1D(\n  8, 2, kernel_size=(3,)")
