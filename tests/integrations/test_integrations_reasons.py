"""What accelerate says about models that it leaves alone, and torchvision's RAFT, which calls a function."""

import copy
import functools
import gc
import logging
import pickle
import types
import warnings

import pytest
import torch
import upstream_raft
from torch import nn
from upstream_decoders import (
    StoresFeatures,
    assert_close,
    is_accelerated,
    one_thread,  # noqa: F401  a fixture
    original,
    problem,
    without_cuda,
)
from upstream_filters import Raft
from upstream_lama import FourierUnit
from upstream_natten import Version21
from upstream_raft import RAFT

from inr_kernels import accelerate
from inr_kernels.integrations import raft, restore
from inr_kernels.models import DEAR, IN2, LIIF

IMAGES = torch.rand(2, 3, 32, 24), torch.rand(2, 3, 32, 24)


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="inr_kernels")
    return caplog


def calls(monkeypatch, model, *args, **kwargs):
    """The output of a call, and how often it ran on our filter."""
    count, ours = [], raft._upsample
    monkeypatch.setattr(raft, "_upsample", lambda *a: count.append(a) or ours(*a))
    return model(*args, **kwargs), len(count)


def test_torchvisions_raft(log, monkeypatch):
    model = RAFT()
    theirs = model(*IMAGES, num_flow_updates=3)
    grads = torch.autograd.grad(sum(flow.sin().sum() for flow in theirs), list(model.parameters()))
    assert accelerate(model) is model
    assert log.messages == ["RAFT accelerated: RAFT's upsample_flow"]
    ours, count = calls(monkeypatch, model, *IMAGES, num_flow_updates=3)
    assert count == 3 and isinstance(model, RAFT) and model.calls == 2
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)
    loss = sum(flow.sin().sum() for flow in ours)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), grads, strict=True):
        assert_close(a, b, 1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert calls(monkeypatch, twin, *IMAGES)[1] == 12
    assert calls(monkeypatch, restore(model), *IMAGES)[1] == 0 and type(model) is RAFT


@torch.no_grad()
def test_torchvisions_raft_compiles():
    """With its own function."""
    model = accelerate(RAFT())
    ours = torch.compile(model, backend="eager", fullgraph=True)(*IMAGES, num_flow_updates=2)
    for a, b in zip(ours, model(*IMAGES, num_flow_updates=2), strict=True):
        assert_close(a, b)


def test_a_function_that_was_replaced_is_called(monkeypatch, log):
    model = accelerate(RAFT())
    monkeypatch.setattr(upstream_raft, "upsample_flow", lambda flow, up_mask: flow)
    assert calls(monkeypatch, model, *IMAGES)[0][0].shape == (2, 2, 4, 3)
    assert "RAFT uses its original method for some calls: its function upsample_flow was replaced" in log.messages


def test_other_globals_are_those_of_the_module(monkeypatch):
    model = accelerate(RAFT())
    before = model(*IMAGES, num_flow_updates=1)[0]
    monkeypatch.setattr(upstream_raft, "SIGN", -1)
    after, count = calls(monkeypatch, model, *IMAGES, num_flow_updates=1)
    assert count == 1
    assert_close(after[0], -before)


def test_no_class_is_left_behind():
    class Own(RAFT):
        pass

    model = Own()
    for _ in range(3):
        accelerate(model)
    model.scale = 1.0
    accelerate(model)
    gc.collect()
    assert Own.__subclasses__() == [type(model)]
    restore(model)
    gc.collect()
    assert not Own.__subclasses__()


def with_function(function):
    """The class RAFT whose forward calls another function as upsample_flow."""
    forward = RAFT.forward
    names = forward.__globals__ | {"upsample_flow": function}
    made = types.FunctionType(forward.__code__, names, "forward", forward.__defaults__, forward.__closure__)
    return type("RAFT", (RAFT,), {"forward": made})


class OldFourierUnit(nn.Module):
    """Of the paper's first code, without the options of LaMa's."""

    def __init__(self):
        super().__init__()
        self.groups, self.conv_layer, self.bn, self.relu = 1, nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()


class FFC(nn.Module):
    """Without gates."""

    def __init__(self):
        super().__init__()
        self.convl2l = self.convl2g = self.convg2l = self.convg2g = nn.Identity()
        self.ratio_gout, self.global_in_num = 0.5, 1


class Queries(nn.Module):
    """CiaoSR's signature."""

    def query_rgb(self, features, coord, scale, cell, radius):
        return coord


KernelConv, NeighborhoodAttention3D, Plain = (
    type(name, (nn.Module,), {}) for name in ("KernelConv", "NeighborhoodAttention3D", "RAFT")
)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: RAFT(large=False), "it has no mask_predictor (raft_small): its flow is enlarged by bilinear"),
        (lambda: with_function(upstream_raft.blurred)(), "upsample_flow is not RAFT's: its output differs"),
        (
            lambda: with_function(upstream_raft.with_mode)(),
            "its function upsample_flow takes (flow, up_mask, mode), not",
        ),
        (
            type("Raft", (Raft,), {"upsample_flow": functools.partial(upstream_raft.upsample_flow)}),
            "its upsample_flow is not a function, but of type partial",
        ),
        (Plain, "its class has the name of one with RAFT's upsample_flow, but it has no upsample_flow"),
        (
            lambda: type("FourierUnit", (OldFourierUnit,), {})(),
            "its class has the name of one with LaMa's Fourier convolution, but it has no fft_norm",
        ),
        (FFC, "its class has the name of one with LaMa's Fourier convolution, but it has no gate"),
        (KernelConv, "its class has the name of one with MISF's KernelConv, but it has no kernel_size"),
        (
            NeighborhoodAttention3D,
            "its class has the name of one with neighborhood attention, but it has no kernel_size",
        ),
        (Queries, "its query_rgb takes 5 arguments (features, coord, scale, cell, radius), not (coord, cell) or"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lookalikes_are_told_why(build, reason, log):
    model = build()
    kind = type(model)
    accelerate(nn.Sequential(model))
    (message,) = log.messages
    assert message.startswith(f"{kind.__qualname__} at '0' not accelerated: {reason}")
    assert type(model) is kind


@pytest.mark.parametrize("network", [DEAR, IN2, LIIF])
def test_our_own_networks_are_no_candidates(network, log):
    accelerate(network.pretrained())
    assert log.messages == [f"accelerate: {network.__name__} already uses the operators of this package"]


def test_a_compiled_model(log):
    accelerate(torch.compile(torch.nn.Linear(2, 2)))
    assert log.messages == ["accelerate found no supported module in Linear; call accelerate before torch.compile"]


def test_errors_of_other_code_are_for_debugging(log):
    class Broken(StoresFeatures):
        def query_rgb(self, coord, cell=None):
            return self.lost

    log.set_level(logging.DEBUG, logger="inr_kernels")
    accelerate(Broken())
    debug, warning = log.records
    assert "has no attribute 'lost'" in str(debug.exc_info[1]) and debug.levelname == "DEBUG"
    assert warning.getMessage().endswith("not accelerated: it does not run alone, on random inputs on a CPU")


@pytest.mark.parametrize("whole", [True, False])
def test_torchscript_is_one_warning(whole, log):
    units = nn.Sequential(FourierUnit(2, 2), FourierUnit(2, 2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript
        traced = torch.jit.trace(units, torch.rand(1, 2, 8, 8), check_trace=False)
    accelerate(traced if whole else nn.ModuleDict({"a": traced, "b": Version21(8, 2, 3)}))
    first, *others = log.messages
    where = "Sequential" if whole else "Sequential at 'a'"
    assert first == (
        f"{where} not accelerated: it is TorchScript, whose layers are compiled; "
        "call accelerate before torch.jit.trace or torch.jit.script"
    )
    assert others == ([] if whole else ["Version21 at 'b' accelerated: neighborhood attention"])


class Timed(StoresFeatures):
    """Counts and times outside of its decoder."""

    def __init__(self):
        super().__init__()
        self.timings, self.count, self.last, self.scale = [], 0, "", 1.0

    def gen_feat(self, inp):
        self.count += 1
        self.timings.append(0.5)
        self.last = str(self.count)
        return super().gen_feat(inp)

    @property
    def factor(self):
        return self.scale

    def query_rgb(self, coord, cell=None):
        return super().query_rgb(coord, cell) * self.factor


def test_state_that_the_decoder_does_not_read_may_change():
    """What it reads through a property may not."""
    model, args = accelerate(Timed()), problem()
    for _ in range(3):
        assert is_accelerated(model, *args)
    model.scale = 2.0
    assert not is_accelerated(model, *args)
    with without_cuda():
        assert torch.equal(model(*args), original(model, *args))


def test_a_method_is_not_the_function_of_its_name(log):
    """A forward that calls self.upsample_flow, in a module with a function of that name."""
    namespace = {"nn": nn, "upsample_flow": lambda flow, up_mask: flow}
    exec(
        "class Flow(nn.Module):\n"
        "    def upsample_flow(self, flow, other): return flow\n"
        "    def forward(self, flow, mask): return self.upsample_flow(flow, mask)\n",
        namespace,
    )
    model = namespace["Flow"]()
    accelerate(model)
    (message,) = log.messages
    assert "not accelerated: its upsample_flow takes" in message and type(model) is namespace["Flow"]


def test_a_module_may_have_an_attribute_of_torchscript(log):
    model = nn.Linear(2, 2)
    model.original_name = nn.Linear(1, 1)
    accelerate(model)
    assert log.messages == ["accelerate found no supported module in Linear"]
