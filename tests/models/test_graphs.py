"""`model.graphed(shape)`: when the graph replaces the forward, and that both give the same result.

A forward that runs again into the same memory replaces CUDA's replay here; test_on_gpu.py uses CUDA.
"""

import contextlib
import copy
import pickle
import traceback
from unittest import mock

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import inr_kernels
from inr_kernels import LocalImplicitDecoder
from inr_kernels._core import backends
from inr_kernels.local_implicit import module
from inr_kernels.models import DEAR, IN2, DEARConfig, IN2Config, LaMa, LaMaConfig
from inr_kernels.models.common import graphs
from inr_kernels.models.common.graphs import Graphed

TINY = {
    "IN2": lambda **options: IN2(
        IN2Config(channels=(16, 16, 32), blocks=1, heads=4, hidden=(16, 16), any_size=True), **options
    ),
    "DEAR": lambda **options: DEAR(
        DEARConfig(channels=8, features=4, blocks=1, filter_blocks=1, hidden=(8, 8)), **options
    ),
}


@pytest.fixture
def captures(monkeypatch):
    """A list with an entry per capture; a replay runs the forward again into the first result's memory."""
    made = []

    def record(run, device):
        out = run()
        made.append(device)
        return out, lambda: out.copy_(run())

    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(graphs, "record", record)
    return made


def pair(height=20, width=24, dtype=torch.float32):
    mask = torch.zeros(1, 1, height, width)
    mask[..., 3:9, 4:11] = 1
    return torch.rand(1, 3, height, width).to(dtype), mask.to(dtype)


def small():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3)).eval()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("options", [{}, {"scale": 1.5}, {"size": (33, 29)}], ids=str)
def test_equals_the_forward(captures, name, options):
    model = TINY[name]().eval()
    fast = model.graphed((1, 3, 20, 24), **options)
    with torch.no_grad():
        for _ in range(3):
            image, mask = pair()
            assert torch.equal(fast(image, mask), model(image, mask, **options))
    assert len(captures) == 1


def test_lama(captures):
    model = LaMa(LaMaConfig(features=8, blocks=1)).eval()
    (image, mask), fast = pair(), model.graphed((1, 3, 20, 24))
    with torch.no_grad():
        assert torch.equal(fast(image, mask), model(image, mask))
        assert torch.equal(fast(image, mask > 0), model(image, mask))  # another dtype: the forward
    assert len(captures) == 1


@pytest.mark.parametrize("name", TINY)
def test_is_the_forward_on_a_cpu(name):
    model, (image, mask) = TINY[name]().eval(), pair()
    with torch.no_grad():
        assert torch.equal(model.graphed(image.shape, scale=2)(image, mask), model(image, mask, scale=2))
    out = model.graphed(image.shape)(image, mask)
    assert out.requires_grad


def test_falls_back(captures):
    model = small()
    fast, x = Graphed(model, [(2, 4)]), torch.randn(2, 4)
    assert fast(x).requires_grad  # gradients are enabled
    with torch.no_grad():
        assert fast(torch.randn(3, 4)).shape == (3, 3)
        model[3].train()
        fast(x)
        model.eval()
        assert not captures
        fast(x)
        assert len(captures) == 1
        with pytest.raises(RuntimeError, match="dtype"):
            fast(x.double())  # the forward's own error
        with pytest.raises(TypeError):
            fast(x, x)
    wants = x.clone().requires_grad_()
    model.requires_grad_(False)
    torch.autograd.grad(fast(wants).sum(), wants)
    assert not fast(x).requires_grad
    torch.testing.assert_close(torch.func.jvp(fast, (x,), (x,))[0], model(x))
    torch.testing.assert_close(torch.vmap(fast)(x.expand(3, 2, 4)), model(x).expand(3, 2, 3))
    assert len(captures) == 1


def test_other_dtypes_run_the_forward(captures):
    model, (image, mask) = TINY["IN2"]().eval(), pair()
    fast = model.graphed(image.shape)
    with torch.no_grad():
        assert fast(image, mask).dtype == torch.float32
        assert fast(image.half(), mask.half()).dtype == torch.float16
        assert torch.equal(fast(image, mask), model(image, mask))
    assert len(captures) == 1


def test_results_are_not_overwritten(captures):
    fast, a, b = Graphed(small(), [(2, 4)]), torch.randn(2, 4), torch.randn(2, 4)
    with torch.no_grad():
        first = fast(a)
        kept = first.clone()
        second = fast(b)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    first.add_(1)
    with torch.no_grad():
        assert torch.equal(fast(b), second)


def test_inputs_do_not_change(captures):
    fast, x = Graphed(small(), [(2, 4)]), torch.randn(4, 2).T
    before = x.clone()
    with torch.inference_mode():
        out = fast(x)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert torch.equal(fast(x), out)
    assert len(captures) == 1


def test_in_place_changes_of_weights_are_seen(captures):
    model, x = small(), torch.randn(2, 4)
    fast = Graphed(model, [(2, 4)])
    with torch.no_grad():
        fast(x)
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
        assert torch.equal(fast(x), model(x))
    assert len(captures) == 1


def assign(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)


def replace(model):
    model[0] = nn.Linear(4, 5)


def convert(model):
    model.double().float()


def drop(model):
    model[3].running_mean = torch.ones(3)


@pytest.mark.parametrize("change", [assign, replace, convert, drop])
def test_replaced_weights_are_captured_again(captures, change):
    model, x = small(), torch.randn(2, 4)
    fast = Graphed(model, [(2, 4)])
    with torch.no_grad():
        fast(x)
        keep = [t.data for t in model.state_dict().values()]  # keeps new tensors from getting the old addresses
        change(model)
        assert torch.equal(fast(x), model(x))
        fast(x)
    assert len(captures) == 2
    assert keep


def test_other_settings_are_captured_again(captures):
    model, (image, mask) = TINY["DEAR"]().eval(), pair()
    fast = model.graphed(image.shape)
    with torch.no_grad():
        fast(image, mask)
        with inr_kernels.backend("reference"):
            assert torch.equal(fast(image, mask), model(image, mask))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(image, mask), model(image, mask))
        assert torch.equal(fast(image, mask), model(image, mask))
    assert len(captures) == 4


def test_autocast_keeps_no_copies_of_the_weights(captures):
    """A graph would read them after the autocast block, whose end frees them, and miss later weights."""
    model, x = small(), torch.randn(2, 4)
    fast = Graphed(model, [(2, 4)])
    kept = []
    model[0].register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        assert torch.equal(fast(x), expected)
        assert kept[:2] == [True, False]
        assert torch.is_autocast_cache_enabled()


def test_the_forwards_errors(captures):
    fast = TINY["DEAR"]().eval().graphed((1, 3, 20, 24))
    with torch.no_grad(), pytest.raises(ValueError, match=r"mask must have shape \[B, 1, H, W\] = \[1, 1, 20, 24\]"):
        fast(torch.rand(1, 3, 20, 24), torch.zeros(1, 1, 20, 23))
    with torch.no_grad(), pytest.raises(TypeError, match=r"mask must be a torch\.Tensor; got NoneType"):
        fast(torch.rand(1, 3, 20, 24), None)
    for shape, message in (
        ((3, 20, 24), r"shape must be \[B, 3, H, W\]; got \(3, 20, 24\)"),
        ((1, 3, 0, 4), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            TINY["DEAR"]().graphed(shape)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_copies_have_no_graph(captures, copied):
    fast, x = Graphed(small(), [(2, 4)]), torch.randn(2, 4)
    with torch.no_grad():
        out = fast(x)
        assert torch.equal(copied(fast)(x), out)
    assert len(captures) == 2


def test_compiles_to_the_forward(captures):
    model, x = small(), torch.randn(2, 4)
    fast = Graphed(model, [(2, 4)])
    with torch.no_grad():
        assert torch.equal(torch.compile(lambda x: fast(x), backend="eager")(x), model(x))
    assert not captures


class Synchronizations(TorchFunctionMode):
    """Records the calls in this package that would synchronize with a GPU or copy numbers to it."""

    names = {"item", "tolist", "numpy", "cpu", "nonzero", "tensor", "as_tensor", "from_numpy", "equal", "unique"}
    names |= {"__bool__", "__int__", "__float__", "__index__"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.names:
            ours = [frame for frame in traceback.extract_stack() if "inr_kernels" in frame.filename]
            self.found.add((function.__name__, ours[-1].name))
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.found = set()
        return super().__enter__()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", TINY)
def test_the_forward_does_not_synchronize(name, backend):
    """With the Triton kernels, and on the default of a GPU without verdicts. `plan_bands` reads tables that are always
    on the CPU."""
    model, (image, mask) = TINY[name]().eval(), pair(10, 12)
    with torch.no_grad(), inr_kernels.backend(backend), Synchronizations() as calls:
        model(image, mask)
    assert calls.found <= {("tolist", "<genexpr>"), ("tolist", "plan_bands")}


def test_records_on_a_side_stream(monkeypatch):
    """The order of the CUDA calls, which are replaced here."""
    log = []

    made = []

    class Stream:
        def __init__(self):
            made.append(self)

        def wait_stream(self, other):
            log.append("wait")

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def within(what, stream=None, capture_error_mode="global"):
        log.append(f"enter {type(what).__name__}")
        assert type(what) is not Graph or stream is made[0]  # where it warmed up
        assert type(what) is not Graph or capture_error_mode == "thread_local"
        yield
        log.append("leave")

    for name, stand_in in {
        "device": within, "stream": within, "graph": within, "Stream": Stream, "CUDAGraph": Graph,
        "current_stream": Stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    out, replay = graphs.record(lambda: log.append("run") or 7, "a device")
    replay()
    warm = ["enter Stream", *["run"] * graphs.WARM_UP, "leave"]
    assert log == ["enter str", "wait", *warm, "wait", "enter Graph", "run", "leave", "leave", "replay"]
    assert out == 7


def test_a_capture_does_not_use_cached_features(monkeypatch):
    """A replay computes them from the current input, and its result is not cached."""
    decoder, feat, coord = LocalImplicitDecoder(3, hidden=(8,)), torch.randn(1, 3, 4, 5), torch.rand(1, 6, 2)
    with torch.no_grad():
        decoder(feat, coord, torch.ones(1, 2))
        before = decoder._hoisted._entry
        monkeypatch.setattr(backends, "is_capturing", lambda device: True)
        monkeypatch.setattr(module, "hoist_features", mock.Mock(side_effect=module.hoist_features))
        decoder(feat, coord, torch.ones(1, 2))
    assert module.hoist_features.call_count == 1
    assert decoder._hoisted._entry is before
