"""neighborhood_attention with more keys, without some, and on sequences."""

import math

import pytest
import torch
import torch.nn.functional as F
from op_backends import backends_of

from inr_kernels import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    merge_attentions,
    neighborhood_attention_1d,
    neighborhood_attention_2d,
)
from inr_kernels.neighborhood_attention import reference

BACKENDS = [name for name in backends_of("neighborhood_attention") if name != "triton"]


def random(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def dense(query, keys, values, seen, scale):
    """query [B, N, heads, d], keys, values [B, M, heads, .], seen [B, N, M] -> out, lse; zeros, -inf without a key."""
    heads = query.shape[2]
    keys, values = (t.repeat_interleave(heads // t.shape[2], 2) for t in (keys, values))
    scores = torch.einsum("bnhd,bmhd->bnhm", query, keys) * scale
    scores = scores.masked_fill(~seen[:, :, None], -math.inf)
    out = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1).nan_to_num(), values)
    return out, scores.logsumexp(-1)


def windows(size, kernel_size):
    """[H W, H W]: whether a query sees a key."""
    one, two = (
        F.one_hot(reference.window(n, k, 1, 1, False)[0], n).sum(1) for n, k in zip(size, kernel_size, strict=True)
    )
    return torch.einsum("ij,kl->ikjl", one, two).flatten(2).flatten(0, 1).bool()


@pytest.mark.parametrize("backend", BACKENDS)
def test_additional_keys(backend):
    q, k, v, more_k, more_v = leaves = random(
        (2, 5, 6, 4, 3), (2, 5, 6, 2, 3), (2, 5, 6, 4, 7), (2, 11, 2, 3), (2, 11, 4, 7)
    )
    out, lse = neighborhood_attention_2d(
        q, k, v, 3, additional_keys=more_k, additional_values=more_v, return_lse=True, backend=backend
    )
    seen = torch.cat([windows((5, 6), (3, 3)), torch.ones(30, 11, dtype=torch.bool)], 1)
    keys, values = (torch.cat([a.flatten(1, 2), b], 1) for a, b in ((k, more_k), (v, more_v)))
    expected = dense(q.flatten(1, 2), keys, values, seen.expand(2, -1, -1), 3**-0.5)
    results = [t.flatten(1, 2) for t in (out, lse)]
    torch.testing.assert_close(results, list(expected))
    grads = [torch.autograd.grad(a.square().sum() + b.sin().sum(), leaves) for a, b in (results, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 150), (7, 7), (12, 21)])
def test_windows_of_all_keys(size, backend):
    """They have kernels of their own: every query sees the same keys."""
    q, k, v = leaves = random((2, *size, 4, 3), (2, *size, 2, 3), (2, *size, 4, 7))
    n, stride = size[0] * size[1], (1, min(size[1], 5))
    results = neighborhood_attention_2d(q, k, v, size, stride=stride, return_lse=True, backend=backend)
    results = [t.flatten(1, 2) for t in results]
    seen = torch.ones(2, n, n, dtype=torch.bool)
    expected = dense(*(t.flatten(1, 2) for t in (q, k, v)), seen, 3**-0.5)
    torch.testing.assert_close(results, list(expected))
    grads = [torch.autograd.grad(a.square().sum() + b.sin().sum(), leaves) for a, b in (results, expected)]
    torch.testing.assert_close(*grads)


def test_merged_parts_equal_the_whole():
    q, k, v = random((2, 9, 3, 4), (2, 12, 3, 4), (2, 12, 3, 5))
    all_keys = torch.ones(2, 9, 12, dtype=torch.bool)
    whole = dense(q, k, v, all_keys, 0.5)
    parts = [dense(q, k[:, part], v[:, part], all_keys[:, :, part], 0.5) for part in (slice(5), slice(5, 12))]
    merged = merge_attentions(*map(list, zip(*parts, strict=True)))
    torch.testing.assert_close(merged, whole)
    assert torch.autograd.gradgradcheck(
        lambda *t: merge_attentions(t[:2], t[2:]), random((1, 2, 3), (1, 2, 3), (1, 2), (1, 2))
    )


def test_merge_without_any_key():
    out, lse = torch.randn(2, 1, 4, 2, 3), torch.randn(2, 1, 4, 2)
    lse[:, 0, 0] = -math.inf
    lse[0, 0, 1] = -math.inf
    lse.requires_grad_()
    merged, total = merge_attentions(list(out), list(lse))
    assert torch.equal(merged[0, 0], torch.zeros(2, 3))
    assert torch.equal(total[0, 0], torch.full((2,), -math.inf))
    torch.testing.assert_close(merged[0, 1], out[1, 0, 1])
    (grad,) = torch.autograd.grad(merged.square().sum() + total[0, 1:].sum(), lse)
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"outputs": []}, "lses must have as many tensors as outputs, 0; got 1"),
        ({"outputs": [torch.zeros(1, 2, 3).int()]}, "outputs must have a floating-point dtype"),
        ({"lses": [torch.zeros(1, 3)]}, r"lses must have shape \[1, 2\]; got \[1, 3\]"),
        ({"lses": [torch.zeros(1, 2).double()]}, "lses must have dtype torch.float32"),
    ],
)
def test_bad_argument_of_merge_attentions(changes, text):
    with pytest.raises((TypeError, ValueError), match=text):
        merge_attentions(**{"outputs": [torch.zeros(1, 2, 3)], "lses": [torch.zeros(1, 2)]} | changes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.0, -0.7])
def test_padding_mask(scale, backend):
    """Of a batch of maps of 5 x 6 and 3 x 2 pixels: some windows have no key."""
    q, k, v = leaves = random((2, 5, 6, 2, 3), (2, 5, 6, 2, 3), (2, 5, 6, 2, 4))
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 2:] = True, True
    out, lse = neighborhood_attention_2d(
        q, k, v, 3, scale=scale, key_padding_mask=mask, return_lse=True, backend=backend
    )
    seen = windows((5, 6), (3, 3)) & ~mask.flatten(1)[:, None]
    factor = 3**-0.5 if scale is None else scale
    expected = dense(*(t.flatten(1, 2) for t in leaves), seen, factor)
    results = [t.flatten(1, 2) for t in (out, lse)]
    torch.testing.assert_close(results, list(expected))
    empty = expected[1] == -math.inf
    assert empty.any()
    assert torch.equal(results[0][empty], torch.zeros_like(results[0][empty]))
    grads = torch.autograd.grad(results[0].square().sum() + results[1][~empty].sum(), leaves)
    few = ~seen.any(-1)[:, :, None, None]  # dense's gradients of these rows are NaN
    safe = [t.detach().requires_grad_() for t in leaves]
    a, b = dense(*(t.flatten(1, 2) for t in safe), seen | few[..., 0], factor)
    kept = torch.where(few, 0, a).square().sum() + b[~empty].sum()
    torch.testing.assert_close(grads, torch.autograd.grad(kept, safe))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_mask_equals_a_smaller_map(dtype):
    q, k, v = (t.detach().to(dtype) for t in random((1, 8, 8, 2, 8), (1, 8, 4, 2, 8), (1, 8, 4, 1, 8)))
    mask = torch.arange(8).view(1, 8, 1).expand(1, 8, 4) >= 5
    options = {"kernel_size": (8, 3), "mean_heads": True}
    out = neighborhood_attention_2d(q, k, v, **options, key_padding_mask=mask)
    small = neighborhood_attention_2d(q, k[:, :5], v[:, :5], (5, 3), mean_heads=True)
    torch.testing.assert_close(out, small, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)
    none = neighborhood_attention_2d(q, k, v, **options, key_padding_mask=torch.ones_like(mask))
    assert torch.equal(none, torch.zeros_like(none))


Q = torch.zeros(1, 5, 6, 2, 4)
MORE = torch.zeros(1, 7, 2, 4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"key_padding_mask": torch.zeros(1, 5, 6)}, "key_padding_mask must have dtype torch.bool; got torch.float32"),
        (
            {"key_padding_mask": torch.zeros(1, 5, 5, dtype=torch.bool)},
            r"key_padding_mask must have shape \[1, 5, 6\]; got \[1, 5, 5\]",
        ),
        ({"additional_keys": MORE}, "additional_values must be a torch.Tensor; got NoneType"),
        (
            {"additional_keys": MORE[..., 1:], "additional_values": MORE},
            r"additional_keys must fit query \[1, 5, 6, 2, 4\], as \[B, L, heads, dim\]; got \[1, 7, 2, 3\]",
        ),
        (
            {"additional_keys": MORE, "additional_values": MORE[:, 1:]},
            r"additional_values must fit additional_keys \[1, 7, 2, 4\]; got \[1, 6, 2, 4\]",
        ),
        (
            {"additional_keys": MORE[:, :0], "additional_values": MORE[:, :0]},
            "additional_keys must have at least one key",
        ),
        (
            {"additional_keys": MORE, "additional_values": MORE, "mean_heads": True, "value": Q[..., :1, :]},
            "additional_keys must be None with mean_heads",
        ),
    ],
)
def test_bad_argument(changes, text):
    with pytest.raises((TypeError, ValueError), match=text):
        neighborhood_attention_2d(**{"query": Q, "key": Q, "value": Q, "kernel_size": 3} | changes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_1d_equals_a_map_of_one_row_or_column(transposed, backend):
    q, k, v, rpb = random((2, 24, 4, 3), (2, 12, 2, 3), (2, 12, 4, 5), (4, 9))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 9:] = True
    options = {"scale": 0.3, "return_lse": True, "backend": backend}
    out, lse = neighborhood_attention_1d(
        q, k, v, 5, dilation=2, stride=3, is_causal=True, rpb=rpb, key_padding_mask=mask, **options
    )
    side, axis = (slice(None, None, -1), 2) if transposed else (slice(None), 1)
    other, lse_of_other = neighborhood_attention_2d(
        *(t.unsqueeze(axis) for t in (q, k, v)),
        (1, 5)[side],
        dilation=(1, 2)[side],
        stride=(1, 3)[side],
        is_causal=(False, True)[side],
        rpb=rpb.unsqueeze(axis),
        key_padding_mask=mask.unsqueeze(axis),
        **options,
    )
    torch.testing.assert_close((out, lse), (other.squeeze(axis), lse_of_other.squeeze(axis)))
    assert out.shape == (2, 24, 4, 5)


def test_1d_is_a_band_of_dense_attention():
    q, k, v = random((2, 13, 2, 4), (2, 13, 2, 4), (2, 13, 2, 4))
    expected, _ = dense(q, k, v, windows((1, 13), (1, 5)).expand(2, -1, -1), 0.5)
    torch.testing.assert_close(neighborhood_attention_1d(q, k, v, 5), expected)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"query": Q}, r"query must have 4 dimensions; got \[1, 5, 6, 2, 4\]"),
        ({"kernel_size": (1, 3)}, r"kernel_size must be a positive integer; got \(1, 3\)"),
        ({"stride": 0}, "stride must be a positive integer; got 0"),
        ({"is_causal": (True, False)}, r"is_causal must be a bool; got \(True, False\)"),
        ({"rpb": torch.zeros(2, 1, 5)}, "rpb must have 2 dimensions"),
        ({"key_padding_mask": torch.zeros(1, 1, 5)}, "key_padding_mask must have 2 dimensions"),
    ],
)
def test_bad_argument_of_1d(changes, text):
    with pytest.raises(ValueError, match=text):
        neighborhood_attention_1d(**{"query": Q[0], "key": Q[0], "value": Q[0], "kernel_size": 3} | changes)


def test_module_1d():
    layer, whole = (
        NeighborhoodAttention1D(8, 2, 3, 2, rel_pos_bias=True),
        NeighborhoodAttention2D(8, 2, (1, 3), (1, 2), rel_pos_bias=True),
    )
    assert {key: list(value.shape) for key, value in layer.state_dict().items()} == {
        "rpb": [2, 5],
        "qkv.weight": [24, 8],
        "qkv.bias": [24],
        "proj.weight": [8, 8],
        "proj.bias": [8],
    }
    whole.load_state_dict(layer.state_dict() | {"rpb": layer.rpb[:, None]})
    x = torch.randn(2, 11, 8)
    torch.testing.assert_close(layer(x), whole(x[:, None])[:, 0])
    with pytest.raises(ValueError, match=r"x must have shape \[B, L, 8\]; got \[1, 9, 4\]"):
        layer(torch.zeros(1, 9, 4))


def test_module_options():
    layer = NeighborhoodAttention2D(8, 2, 4, stride=2, is_causal=(True, False), qk_scale=0.1, proj_drop=1.0)
    assert "stride=(2, 2), is_causal=(True, False), qk_scale=0.1" in repr(layer)
    x = torch.randn(1, 7, 8, 8)
    assert not layer(x).any()
    qkv = layer.eval().qkv(x).view(1, 7, 8, 3, 2, 4)
    out = neighborhood_attention_2d(*qkv.unbind(3), 4, stride=2, is_causal=(True, False), scale=0.1)
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(3)))
