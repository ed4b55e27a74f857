"""accelerate on HDiT's neighborhood attention: the forward of the block on this package's op, or no change."""

import copy
import logging
import pickle

import pytest
import torch
import upstream_hdit
from integrations_cases import assert_not_accelerated
from upstream_hdit import UNSUPPORTED, NeighborhoodSelfAttentionBlock

from inr_kernels import accelerate
from inr_kernels.integrations import hdit, restore


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="inr_kernels")
    return caplog


def inputs(dtype=torch.float32):
    """x, pos, cond."""
    shapes = (2, 7, 9, 16), (7, 9, 2), (2, 6)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_block_with_stored_weights(dtype, monkeypatch, log):
    model, args = NeighborhoodSelfAttentionBlock().to(dtype), inputs(dtype)
    twin = copy.deepcopy(model)
    assert accelerate(model) is model
    assert log.messages == ["NeighborhoodSelfAttentionBlock accelerated: HDiT's neighborhood attention"]
    ours = model(*args)
    with pytest.raises(ModuleNotFoundError):
        twin(*args)
    monkeypatch.setattr(upstream_hdit, "natten", hdit.UNFUSED)
    theirs = twin(*args)
    grads = [torch.autograd.grad(o.sin().sum(), [*args, *m.parameters()]) for o, m in ((ours, model), (theirs, twin))]
    for one, other in zip((ours, *grads[0]), (theirs, *grads[1]), strict=True):
        assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * other.norm()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_blocks_are_not_accelerated(name, log):
    build, reason = UNSUPPORTED[name]
    assert_not_accelerated(build(), reason, log)


def test_a_lookalike_is_named(log):
    accelerate(type("NeighborhoodSelfAttentionBlock", (torch.nn.Module,), {})())
    assert "one with HDiT's neighborhood attention, but it has no d_head" in log.messages[0]


def test_other_devices_use_nattens_kernels(monkeypatch, log):
    model = accelerate(NeighborhoodSelfAttentionBlock())
    x = torch.zeros(1, 7, 9, 16, device="meta")
    assert hdit._why_not_this_call(model, x) == ""
    monkeypatch.setattr(upstream_hdit, "natten", hdit.UNFUSED)
    assert "on meta NATTEN's kernels run" in hdit._why_not_this_call(model, x)


def test_changes_copies_pickles_and_restore(log):
    model, args = accelerate(NeighborhoodSelfAttentionBlock()), inputs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        torch.testing.assert_close(twin(*args), model(*args))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), model(*args))
    torch.compiler.reset()
    model.kernel_size = 3
    with pytest.raises(ModuleNotFoundError):  # the original runs
        model(*args)
    assert log.messages[-1].endswith("a flag has changed; call accelerate(model) again to accept it")
    assert type(restore(model)) is NeighborhoodSelfAttentionBlock
