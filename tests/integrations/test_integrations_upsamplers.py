"""accelerate on the attention of NAF and AnyUp: the same output and gradients, or no change."""

import copy
import logging
import pickle

import pytest
import torch
import upstream_natten
import upstream_upsamplers
from integrations_cases import assert_not_accelerated
from upstream_upsamplers import UNSUPPORTED, CrossAttention, Divided, DividedMean, NATTENCrossAttention

from inr_kernels import accelerate, neighborhood_attention_2d
from inr_kernels.integrations import class_swap, restore, upsamplers

RATIO = 2, 3


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="inr_kernels")
    return caplog


def is_accelerated(model, *args, **options):
    """Whether a call runs on our op."""
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        ours = lambda *a, **k: calls.append(a) or neighborhood_attention_2d(*a, **k)  # noqa: E731
        patch.setattr(upsamplers, "neighborhood_attention_2d", ours)
        model(*args, **options)
    return bool(calls)


def inputs(value_channels, dtype=torch.float32, keys=(5, 6)):
    """q, k, v."""
    size = tuple(n * r for n, r in zip(keys, RATIO, strict=True))
    shapes = (2, 8, *size), (2, 8, *keys), (2, value_channels, *keys)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def results(model, tensors, **options):
    """The output, and the gradients of the inputs and the parameters, but the key's bias, whose gradient is zero."""
    out = model(*tensors, **options)
    leaves = [*tensors, *(p for name, p in model.named_parameters() if name != "k_proj.bias")]
    return [out, *torch.autograd.grad(out.sin().sum(), leaves)]


CASES = {
    "naf": (CrossAttention, 12, {}),
    "anyup": (NATTENCrossAttention, 7, {"kernel_size": (5, 3), "dilation": RATIO}),
}
EACH = pytest.mark.parametrize("name", CASES)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recent", [True, False])
def test_output_and_gradients_match_the_original(name, dtype, recent, monkeypatch, log):
    monkeypatch.setattr(upstream_upsamplers, "RECENT", recent)
    cls, channels, options = CASES[name]
    model = cls(8, 2).to(dtype)
    twin, tensors = copy.deepcopy(model), inputs(channels, dtype)
    assert accelerate(model) is model
    assert log.messages == [f"{cls.__name__} accelerated: cross-scale attention"]
    assert is_accelerated(model, *tensors, **options)
    for ours, theirs in zip(*(results(m, tensors, **options) for m in (model, twin)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * theirs.norm()
    assert getattr(model, "dilation", None) == getattr(twin, "dilation", None)


@EACH
def test_runs_where_the_original_cannot(name, monkeypatch):
    monkeypatch.setattr(upstream_natten, "RUNS", False)
    cls, channels, options = CASES[name]
    model, tensors = accelerate(cls(8, 2)), inputs(channels)
    assert is_accelerated(model, *tensors, **options)
    with pytest.raises(upstream_natten.NotInstalled):
        restore(model)(*tensors, **options)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_attentions_are_not_accelerated(name, log):
    build, reason = UNSUPPORTED[name]
    assert_not_accelerated(build(), reason, log)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("naf", lambda q, k, v: ((q, k, v), {"return_weights": True}), "return_weights is given"),
        ("naf", lambda q, k, v: ((q[:, :, 1:], k, v), {}), "the size of q is no multiple of that of k"),
        ("naf", lambda q, k, v: ((q[:, :4], k[:, :4], v), {}), "scale is not that of q's heads"),
        ("anyup", lambda q, k, v: ((q, k, v, 3, (1, 3)), {}), "the dilation is not the ratio of q's size to k's"),
    ],
)
def test_calls_that_use_the_original(name, change, reason, log):
    cls, channels, _ = CASES[name]
    model = accelerate(cls(8, 2))
    args, options = change(*(t.detach() for t in inputs(channels)))
    if name == "anyup":
        model.q_proj = model.k_proj = torch.nn.Identity()
    assert not is_accelerated(model, *args, **options)
    assert log.messages[-1].endswith(reason)


@EACH
@pytest.mark.parametrize("change", [lambda q, k, v: (q[0], k, v), lambda q, k, v: (q, k[:, :, :0], v)])
def test_bad_shapes_raise_as_the_original(name, change, log):
    cls, channels, options = CASES[name]
    model = cls(8, 2)
    args = change(*inputs(channels))
    with pytest.raises(Exception) as expected:
        model(*args, **options)
    with pytest.raises(type(expected.value)) as raised:
        accelerate(model)(*args, **options)
    assert str(raised.value) == str(expected.value)
    assert log.messages[-1].endswith(class_swap.UNSUPPORTED_CALL)


@EACH
def test_keywords_that_only_a_copy_reads(name, log):
    _, channels, options = CASES[name]
    model, tensors = {"naf": Divided, "anyup": DividedMean}[name](8, 2), inputs(channels)
    expected = model(*tensors, **options, divisor=2.0)
    accelerate(model)
    assert is_accelerated(model, *tensors, **options)
    torch.testing.assert_close(model(*tensors, **options, divisor=2.0), expected)
    assert log.messages[-1].endswith("divisor is given")


@EACH
def test_autocast_and_later_sizes(name, log):
    cls, channels, options = CASES[name]
    model, tensors = cls(8, 2), inputs(channels)
    model(*tensors, **options)  # NAF's sets its dilation
    accelerate(model)
    assert is_accelerated(model, *inputs(channels, keys=(6, 7)), **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_accelerated(model, *tensors, **options)
    assert log.messages[-1].endswith("autocast is enabled")


@EACH
def test_copies_pickles_and_restore(name):
    cls, channels, options = CASES[name]
    model, tensors = accelerate(cls(8, 2)), inputs(channels)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        torch.testing.assert_close(twin(*tensors, **options), model(*tensors, **options))
    assert type(restore(model)) is cls
