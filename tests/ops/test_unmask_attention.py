"""The accuracy of unmask_attention, against eq. 6-7 and float64, on every backend that runs here."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_backends import backends_of
from unmask_attention_cases import HOLES, SHAPES, Case, assert_kernel_as_accurate, mask_of

from inr_kernels import unmask_attention
from inr_kernels._core import backends

BACKENDS = backends_of("unmask_attention")
KERNELS = [name for name in BACKENDS if name != "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hole", HOLES)
def test_equals_the_paper(hole, backend):
    """Eq. 6-7 with torch's own attention, which masks no keys."""
    case = Case((2, 12, 6, 9), hole)
    feat = case.feat.float().requires_grad_()
    tokens = feat.flatten(2).mT
    expected = F.scaled_dot_product_attention((1 - case.mask.flatten(2).mT) * tokens, tokens, tokens)
    expected = expected.mT.reshape(feat.shape)
    out = unmask_attention(feat, case.mask, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(o, feat, case.grad.float())[0] for o in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_are_excluded(backend):
    """Known pixels attend to known pixels only; masked pixels get the mean of the known ones."""
    case = Case((1, 6, 5, 7), "some")
    feat, known = case.feat.float(), case.mask.flatten() == 0
    out = unmask_attention(feat, case.mask, mask_keys=True, backend=backend).flatten(2)[0]
    alone = feat.flatten(2)[:, :, known]
    expected = unmask_attention(alone[:, :, None], torch.zeros(1, 1, 1, alone.shape[2]), backend="reference")
    torch.testing.assert_close(out[:, known], expected[0, :, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[:, ~known], alone[0].mean(1, keepdim=True).expand(-1, int((~known).sum())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal_numbers(backend):
    """Two pixels of one channel, 0 and log 3: the second gives them the weights 1 : e^(log² 3)."""
    feat, x = torch.tensor([0.0, 1.0986123]).view(1, 1, 1, 2), 1.0986123
    out = unmask_attention(feat, torch.zeros(1, 1, 1, 2), backend=backend).flatten()
    weight = torch.tensor(x * x).exp()
    torch.testing.assert_close(out, torch.stack([torch.tensor(x / 2), x * weight / (1 + weight)]))
    hole = unmask_attention(feat, torch.tensor([[[[0.0, 1.0]]]]), backend=backend).flatten()
    assert hole[1] == torch.tensor(x / 2)
    none = unmask_attention(feat, torch.ones(1, 1, 1, 2), mask_keys=True, backend=backend)
    assert none.tolist() == [[[[0, 0]]]]


@pytest.mark.parametrize("mask_keys", [False, True])
@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_eager(dtype, hole, mask_keys):
    assert_kernel_as_accurate(Case((2, 33, 13, 17), hole, mask_keys), dtype, "cpu")


@pytest.mark.parametrize("mask_keys", [False, True])
@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_accurate_as_eager_in_triton(dtype, hole, mask_keys):
    assert_kernel_as_accurate(Case((2, 20, 9, 11), hole, mask_keys), dtype, "triton")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    for dtype in (torch.float32, torch.bfloat16):
        for mask_keys in (False, True):
            assert_kernel_as_accurate(Case(SHAPES[name], "some", mask_keys), dtype, "cpu")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_in_triton(name):
    batch, channels, *sides = SHAPES[name]
    sides = [min(side, 24) if min(sides) > 24 else side for side in sides]  # the interpreter is slow
    for dtype, widest in ((torch.float32, 64), (torch.float16, 256)):
        assert_kernel_as_accurate(Case((batch, min(channels, widest), *sides), "mixed"), dtype, "triton")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 24), st.integers(1, 24)),
    hole=st.sampled_from(HOLES),
    mask_keys=st.booleans(),
    scale=st.sampled_from([None, 0.0, 1e-3, 1.0, -0.5]),
    size=st.sampled_from([0.1, 1.0, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_random_problems(shape, hole, mask_keys, scale, size, dtype):
    assert_kernel_as_accurate(Case(shape, hole, mask_keys, scale, size), dtype, "cpu")


@pytest.mark.parametrize("mask_keys", [False, True])
@pytest.mark.parametrize("hole", ["some", "mixed"])
def test_gradcheck_through_the_kernel(hole, mask_keys):
    case = Case((2, 3, 3, 4), hole, mask_keys)
    attend = lambda feat: unmask_attention(feat, case.mask, mask_keys=mask_keys, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(attend, case.feat.requires_grad_())


def test_gradgradcheck_through_the_reference():
    feat, mask = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True), mask_of("some", 1, 2, 3)
    assert torch.autograd.gradgradcheck(lambda feat: unmask_attention(feat, mask, backend="reference"), feat)


@pytest.mark.parametrize("mask_keys", [False, True])
def test_more_images_than_a_launch_takes_in_triton(mask_keys, monkeypatch):
    case = Case((35, 3, 2, 3), "mixed", mask_keys)
    whole = case.run(torch.float32, "triton")
    monkeypatch.setattr(backends, "_GRID", 16)
    assert all(map(torch.equal, whole, case.run(torch.float32, "triton")))


@pytest.mark.parametrize("backend", KERNELS)
def test_masked_pixels_are_exactly_the_mean(backend):
    """Also of values of very different size, whose sum in float32 would be inexact."""
    feat = torch.cat((torch.full((1, 1, 8, 8), 1e4), torch.rand(1, 1, 8, 8)), 3)
    feat = feat.double().float()
    mask = torch.ones(1, 1, 8, 16)
    out = unmask_attention(feat, mask, backend=backend)
    assert out.unique().numel() == 1
    torch.testing.assert_close(out[0, 0, 0, 0].double(), feat.double().mean(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend):
    """With scores of ±1e4 the softmax selects the maximum, and nothing overflows."""
    feat = torch.randn(1, 4, 5, 6) * 100
    mask = mask_of("some", 1, 5, 6)
    feat.requires_grad_()
    out = unmask_attention(feat, mask, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), feat)
    assert out.isfinite().all()
    assert grad.isfinite().all()
    exact = unmask_attention(feat.double(), mask, backend="reference")
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_every_pixel_of_their_image(value, backend):
    feat, mask = torch.rand(2, 3, 4, 5) + 0.1, mask_of("none", 2, 4, 5)
    feat[0, 1, 2, 3] = value
    out = unmask_attention(feat, mask, backend=backend)
    assert not out[0, 1].isfinite().any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pixel", [0, 1], ids=["hole", "known"])
@pytest.mark.parametrize("mask_keys", [False, True])
def test_holes_get_the_mean_of_values_that_are_not_finite(mask_keys, pixel, value, backend):
    """In the channels that hold them; with mask_keys, those of holes reach no pixel."""
    feat, mask = torch.rand(1, 3, 2, 4), torch.tensor([1.0, 0, 1, 0, 0.5, 0, 0, 1]).view(1, 1, 2, 4)
    feat[0, 1].view(-1)[pixel] = value
    out, holes = unmask_attention(feat, mask, mask_keys=mask_keys, backend=backend), (mask == 1).flatten()
    share = (1 - mask if mask_keys else torch.ones_like(mask)).flatten()
    mean = (torch.where(share > 0, feat.flatten(2) * share, 0)).sum(2) / share.sum()
    torch.testing.assert_close(out.flatten(2)[..., holes], mean[..., None].expand(1, 3, 3), equal_nan=True)
    assert mean.isfinite().all() == (mask_keys and pixel == 0)
    if mask_keys and pixel == 0:
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_in_one_image_do_not_affect_the_gradient_of_another(dtype):
    """One thread packs both images; the known pixels of the second do not fill whole vectors."""
    feat, mask, grad = torch.randn(2, 3, 5, 5), torch.zeros(2, 1, 5, 5), torch.randn(2, 3, 5, 5)
    feat[0], mask[1, :, 4], mask[1, 0, 3, 4] = torch.inf, 1, 1
    feat, grad = feat.to(dtype).requires_grad_(), grad.to(dtype)
    (both,) = torch.autograd.grad(unmask_attention(feat, mask, backend="cpu"), feat, grad)
    (alone,) = torch.autograd.grad(unmask_attention(feat[1:], mask[1:], backend="cpu"), feat, grad[1:])
    assert torch.equal(both[1], alone[1])


def test_gradients_are_deterministic_for_any_number_of_threads():
    case, before, runs = Case((2, 16, 30, 31), "mixed"), torch.get_num_threads(), []
    for threads in (1, 2, 5, 5):
        torch.set_num_threads(threads)
        runs.append(case.run(torch.float32, "cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
