"""accelerate on element-wise filters of other projects: the same output and gradients, or no change."""

import copy
import logging
import math
import pickle

import pytest
import torch
from integrations_cases import assert_not_accelerated
from torch import nn
from upstream_decoders import StoresFeatures, assert_close
from upstream_filters import UNSUPPORTED, AnyFactor, KernelConv, KernelConv2D, NoRate, Pair, Ported, Raft, Stereo

from inr_kernels import accelerate, elementwise_filter
from inr_kernels.integrations import class_swap, fac, filter_dtypes, restore


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="inr_kernels")
    return caplog


def is_accelerated(model, *args):
    """Whether a call runs on our op."""
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr(
            filter_dtypes, "elementwise_filter", lambda *a, **k: calls.append(a) or elementwise_filter(*a, **k)
        )
        model(*args)
    return bool(calls)


def original(model):
    """The object with its original class."""
    twin = object.__new__(model._inr_original)
    vars(twin).update(vars(model))
    return twin


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def results(model, args):
    """The outputs and the gradients of each argument that has one."""
    out = model(*args)
    outs = out if isinstance(out, tuple) else (out,)
    leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, weights)]


def assert_same(model, args, tolerance=1e-5):
    """The accelerated model runs on our op, and its outputs and gradients match the original."""
    theirs = results(original(model), args)
    assert is_accelerated(model, *args)
    for ours, their in zip(results(model, args), theirs, strict=True):
        assert_close(ours, their, tolerance)


def core_of(frames, side):
    return frames[0], math.prod(frames[1:-2]) * side**2, *frames[-2:]


FRAMES = {
    "not square": (2, 3, 6, 17),
    "a batch above K²": (27, 2, 3, 4),
    "sides below K": (2, 2, 1, 2),
    "one of each": (1, 1, 2, 4),
    "colours": (2, 4, 3, 5, 8),
    "one colour": (2, 4, 1, 5, 8),
    "one image in colours": (1, 1, 3, 5, 8),
}


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("cls", [KernelConv, NoRate, Pair])
def test_kernel_conv(cls, side, name):
    model = accelerate(cls((side,)))
    leaves = tensors(FRAMES[name], core_of(FRAMES[name], side))
    assert_same(model, leaves)
    assert_same(model, [*leaves, 2.0])
    assert_same(model, [*leaves, torch.full((1,), 3.0, requires_grad=True)])
    if cls is KernelConv:
        for rate in (1, 2, 3, 4):
            assert_same(model, [*leaves, 1.0, rate])


def test_kernel_conv_reads_a_core_of_transposed_size():
    """What MISF passes for an image that is not square."""
    assert_same(accelerate(KernelConv()), tensors((2, 3, 4, 6), (2, 27, 6, 4)))


SIZES = [(2, 3, 5, 8), (11, 2, 3, 4), (1, 1, 1, 1), (2, 2, 2, 9)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [1, 3, 5])
def test_fac_where_the_original_cannot_run(side, size, log):
    leaves = tensors(size, (size[0], size[1] * side**2, *size[2:]))
    model = KernelConv2D(side)
    with pytest.raises(NotImplementedError):
        model(*leaves)
    accelerate(model)
    assert log.messages == ["KernelConv2D accelerated: STFAN's KernelConv2D"]
    assert_same(accelerate(Ported(side)), leaves)
    for other in (model, fac.KernelConv2D(side)):
        for ours, theirs in zip(results(other, leaves), results(Ported(side), leaves), strict=True):
            assert_close(ours, theirs)


def test_fac_golden_through_its_drop_in(golden):
    arrays = golden("fac_k3")
    assert_close(fac.KernelConv2D(3)(arrays["x"], arrays["kernel"]), arrays["out"], 1e-6)
    accelerate(model := fac.KernelConv2D(3))
    assert type(model) is fac.KernelConv2D


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 4, 7), (11, 3, 2), (1, 1, 1)])
@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_raft(factor, batch, height, width):
    leaves = tensors((batch, 2, height, width), (batch, 9 * factor**2, height, width))
    assert_same(accelerate(Raft(factor)), leaves)
    assert_same(accelerate(Stereo(factor)), [leaves[0][:, :1].detach().requires_grad_(), leaves[1]])


def test_raft_of_any_factor():
    model = accelerate(AnyFactor())
    for factor in (2, 8, 3):
        assert_same(model, tensors((2, 2, 3, 4), (2, 9 * factor**2, 3, 4)))
    assert not is_accelerated(model, *tensors((2, 2, 3, 4), (2, 9 * 17**2, 3, 4)))


def test_raft_golden(golden):
    arrays = golden("raft_upsample_flow")
    model = accelerate(Raft())
    assert is_accelerated(model, arrays["flow"], arrays["mask"])
    assert_close(model(arrays["flow"], arrays["mask"]), arrays["out"], 1e-6)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_filters_are_not_accelerated(name, log):
    build, reason = UNSUPPORTED[name]
    assert_not_accelerated(build(), reason, log)


PROBLEMS = {
    KernelConv: [(2, 3, 5, 4), (2, 27, 5, 4)],
    Pair: [(2, 3, 5, 4), (2, 27, 5, 4)],
    Ported: [(2, 3, 5, 4), (2, 27, 5, 4)],
    Raft: [(2, 2, 5, 4), (2, 576, 5, 4)],
}
EACH = pytest.mark.parametrize("cls", PROBLEMS)


@EACH
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_mix_as_in_eager(cls, first, second):
    shapes = PROBLEMS[cls]
    args = [tensors(shapes[0], dtype=first)[0], tensors(shapes[1], dtype=second)[0]]
    coarse = max(torch.finfo(dtype).eps for dtype in (first, second))
    assert_same(accelerate(cls()), args, 6 * coarse if coarse > 1e-6 else 1e-5)


@EACH
@pytest.mark.parametrize("dtypes", [(0, 0), (0, 1), (1, 1)])
def test_autocast_returns_the_dtype_of_the_original(cls, dtypes):
    kinds = (torch.float32, torch.bfloat16)
    args = [tensors(shape, dtype=kinds[i])[0] for shape, i in zip(PROBLEMS[cls], dtypes, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(accelerate(cls()), args, 0.05)


@EACH
def test_restore_undoes_everything(cls):
    model, args = cls(), tensors(*PROBLEMS[cls])
    before, state = dict(vars(model)), model.state_dict()
    assert accelerate(accelerate(model)) is model
    assert isinstance(model, cls)
    assert isinstance(model, class_swap.AcceleratedModule)
    assert repr(model) == repr(cls())
    model(*args)
    assert list(model.state_dict()) == list(state)
    assert restore(restore(model)) is model
    assert type(model) is cls
    assert vars(model) == before


@EACH
def test_copies_and_pickles(cls, log):
    model, args = accelerate(cls()), tensors(*PROBLEMS[cls])
    log.clear()
    for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert_same(twin, args)
    assert not log.records


@EACH
def test_compiles_without_graph_breaks(cls):
    model, args = accelerate(cls()), tensors(*PROBLEMS[cls])
    theirs = model(*args)
    ours = torch.compile(model, fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (ours, theirs)), strict=True):
        assert_close(a, b)
    torch.compiler.reset()


class Sharpens(KernelConv):
    sharpened = False

    def forward(self, frames, core, white_level=1.0, rate=1):
        return super().forward(frames, core, white_level, rate) * (2 if self.sharpened else 1)


class Fresh(Sharpens):
    """A class whose forward a test changes."""

    forward = Sharpens.forward


def sharpen(model):
    model.sharpened = True


def other_size(model):
    model.kernel_size[0] = 1


def with_bias(model):
    model.core_bias = True


def other_forward(model):
    Fresh.forward = lambda self, frames, *_: frames - 1


@pytest.mark.parametrize("change", [sharpen, other_size, with_bias, other_forward])
def test_later_changes_of_kernel_conv_use_the_original(change, log, monkeypatch):
    monkeypatch.setattr(Fresh, "forward", Fresh.forward)
    model, args = Fresh(), tensors(*PROBLEMS[KernelConv])
    model.sharpened = False
    assert is_accelerated(accelerate(model), *args)
    change(model)
    assert_same_outcome(model, *args)
    assert log.messages[-1].startswith("Fresh uses its original method for some calls: ")


def test_a_later_hook_on_fac_uses_the_original():
    model, args = accelerate(Ported()), tensors(*PROBLEMS[Ported])
    model.pad.register_forward_hook(lambda module, args, out: 2 * out)
    assert_same_outcome(model, *args)
    model = accelerate(Ported())
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: out + 1)
    try:
        assert_same_outcome(model, *args)
    finally:
        hook.remove()


def assert_same_outcome(model, *args):
    """The outcome is bit for bit the original's output, or its error."""
    theirs, ours = outcome(original(model), *args), outcome(model, *args)
    if isinstance(theirs, Exception):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
    else:
        assert torch.equal(ours, theirs)


def outcome(model, *args):
    try:
        return model(*args)
    except Exception as error:
        return error


@pytest.mark.parametrize("rate", [0, -1, 1.0])
def test_errors_for_a_rate_match_the_original(rate):
    assert_same_outcome(accelerate(KernelConv()), *tensors(*PROBLEMS[KernelConv]), 1.0, rate)


def test_errors_match_the_original():
    frames, core = tensors(*PROBLEMS[KernelConv])
    for wrong in (core[:, :26], core[..., :3], core[:1], core.long(), None):
        assert_same_outcome(accelerate(KernelConv()), frames, wrong)
        assert_same_outcome(accelerate(Ported()), frames, wrong)
    flow, mask = tensors(*PROBLEMS[Raft])
    for wrong in ([flow[:, :1], mask], [flow, mask[:, :9]], [flow, mask[..., :3]], [flow, None], [flow[0], mask]):
        assert_same_outcome(accelerate(Raft()), *wrong)


def test_a_model_with_several_supported_modules(log):
    class Both(StoresFeatures, Raft):
        """A LIIF decoder that also upsamples flow: one of the two methods is accelerated."""

    model = nn.ModuleDict({"a": KernelConv(), "b": nn.Sequential(Ported(), Pair()), "c": Raft(4), "d": Both()})
    accelerate(model)
    assert [message.split(":")[0].split(".")[-1] for message in log.messages] == [
        "KernelConv at 'a' accelerated",
        "0' accelerated",
        "1' accelerated",
        "Raft at 'c' accelerated",
        "Both at 'd' accelerated",
    ]
    restore(model)
    assert not any(isinstance(module, class_swap.AcceleratedModule) for module in model.modules())
