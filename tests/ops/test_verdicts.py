"""The verdicts' file and summary, and how verdicts choose the default, on a made-up GPU."""

import json

import made_up
import pytest
import torch
from made_up.functional import OP
from made_up.functional import made_up as call

import inr_kernels
from inr_kernels._core import devices, dispatch, verdicts
from inr_kernels._core.dispatch import Facts
from inr_kernels._core.verdicts import Verdict
from inr_kernels.models.common import graphs
from inr_kernels.models.common.graphs import Graphed

CPU = torch.device("cpu")
FACTS = Facts(CPU, torch.float32)


@pytest.fixture(autouse=True)
def gpu(tmp_path, monkeypatch):
    """CPU tensors are on a made-up GPU, without verdicts."""
    monkeypatch.setattr(verdicts, "file", lambda: tmp_path / "verdicts.json")
    monkeypatch.setattr(verdicts, "_tables", {})
    monkeypatch.setattr(verdicts, "_unsaved", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    torch.set_float32_matmul_precision("highest")
    with made_up.installed():
        yield devices.find(CPU)


def verdict(backend, reason="", kernel=(1e-3, 1e-3), dtype="float32", form="any"):
    return Verdict("made_up", backend, dtype, form, reason, kernel, (2e-3, 2e-3))


def stored_as(**changes):
    """The JSON of a file with one verdict, with some fields replaced."""
    return json.dumps({"format": 1, "verdicts": {"a": [verdict("x").__dict__ | changes]}}).encode()


FILES = {
    "empty": (b"", "it is not JSON"),
    "cut": (b"{", "it is not JSON"),
    "bytes": (b"\xff\x00", "it is not JSON"),
    "deep": (b"[" * 100_000, "it is not JSON"),
    "list": (b"[]", "it has no format"),
    "format": (b'{"format": 99, "verdicts": {}}', "its format is 99, not 1"),
    "missing": (b'{"format": 1}', "an entry is not a verdict"),
    "fields": (b'{"format": 1, "verdicts": {"a": [{"b": 1}]}}', "an entry is not a verdict"),
    "number": (b'{"format": 1, "verdicts": 3}', "an entry is not a verdict"),
    "time": (stored_as(kernel=(0, 1)), "an entry is not a verdict"),
    "one time": (stored_as(kernel=[1]), "an entry is not a verdict"),
    "name": (stored_as(backend=5), "an entry is not a verdict"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_something_else_is_ignored(gpu, name):
    """And kept under another name, when there are verdicts to save."""
    text, reason = FILES[name]
    path = verdicts.file()
    path.write_bytes(text)
    with pytest.warns(UserWarning, match=f"verdicts.json holds no verdicts .* is ignored: {reason}$"):
        assert verdicts.stored() == {}
    with pytest.warns(UserWarning, match="ignored"):
        verdicts.save(gpu.key, [verdict("right")])
    assert verdicts.stored() == {gpu.key: [verdict("right")]}
    assert path.with_suffix(".invalid").read_bytes() == text


def test_a_file_that_cannot_be_read(gpu):
    verdicts.file().mkdir()
    with pytest.warns(UserWarning, match="is ignored: it cannot be read: Is a directory$"):
        assert verdicts.stored() == {}


def test_the_summary_counts_forward_and_backward(gpu, monkeypatch):
    monkeypatch.delitem(OP.backends, "raising at import")
    verdicts.save(gpu.key, [verdict("right"), verdict("slow", kernel=(1e-3, 3e-3)), verdict("slow", form="other")])
    text = inr_kernels.explain("made_up", torch.zeros(3))
    assert "  right      runs; proof: on in 1 of 1 forms\n" in text
    assert "  slow       runs; proof: forward on in 2 of 2 forms, backward in 1\n" in text


def test_a_choice_is_remembered(gpu, monkeypatch):
    """Until the verdicts change; for each dtype, form, direction and precision of float32."""
    verdicts.save(gpu.key, [verdict("right"), verdict("slow", dtype="bfloat16")])
    facts = [FACTS, Facts(CPU, torch.bfloat16)]
    chosen = [OP.choose(None, f, backward) for f in facts for backward in (False, True)]
    assert chosen == [OP.backends[name] for name in ("right", "right", "slow", "slow")]
    with monkeypatch.context() as patch:
        patch.setattr(OP, "default", None)
        assert chosen == [OP.choose(None, f, backward) for f in facts for backward in (False, True)]
        with pytest.raises(TypeError):
            torch.set_float32_matmul_precision("high")
            OP.choose(None, FACTS)
    torch.set_float32_matmul_precision("highest")
    verdicts.forget(lambda key, v: v.backend == "right")
    with pytest.warns(UserWarning, match="not proven"):
        assert OP.choose(None, FACTS) is OP.backends["reference"]


def test_remembered_choices_are_bounded(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "_MAX_CHOICES", 2)
    verdicts.save(gpu.key, [verdict("right")])
    dtypes = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float32
    with pytest.warns(UserWarning, match="not proven"):
        names = [OP.choose(None, Facts(CPU, dtype)) for dtype in dtypes]
    assert names[0] is names[-1] is OP.backends["right"] and len(OP._chosen) <= 2


def test_nothing_is_remembered_in_a_capture(gpu, monkeypatch):
    """Where the verdicts were not read, and no warning was given."""
    verdicts.save(gpu.key, [verdict("right")])
    monkeypatch.setattr(made_up.MadeUp, "capturing", True)
    assert OP.choose(None, FACTS) is OP.backends["reference"]
    monkeypatch.setattr(made_up.MadeUp, "capturing", False)
    assert OP.choose(None, FACTS) is OP.backends["right"]


class Doubles(torch.nn.Module):
    """A network that calls the op without a request."""

    def forward(self, x):
        return call(x)


def test_a_captured_default_path(gpu, monkeypatch):
    """A graph holds the default that the verdicts give, also if its capture is the first use of the GPU; it is captured
    again when they change."""
    ran, captured = [], []

    def watch(name, backend):
        def forward(x):
            ran.append(name)
            return backend.forward(x)

        return dispatch.Backend(backend.why_not, forward)

    def record(run, device):
        """As graphs.record: warm-up, then the capture; a replay repeats what was captured."""
        run()
        monkeypatch.setattr(made_up.MadeUp, "capturing", True)
        del ran[:]
        out = run()
        monkeypatch.setattr(made_up.MadeUp, "capturing", False)
        captured.append(list(ran))
        return out, lambda: None

    for name in ("reference", "right", "slow"):
        monkeypatch.setitem(OP.backends, name, watch(name, OP.backends[name]))
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(graphs, "record", record)
    verdicts.save(gpu.key, [verdict("right"), verdict("slow", kernel=(1.5e-3, 1e-3))])
    fast, x = Graphed(Doubles().eval(), [(3,)]), torch.ones(3)
    assert torch.equal(fast(x), 2 * x) and torch.equal(fast(x), 2 * x)
    assert captured == [["right"]]
    verdicts.forget(lambda key, v: v.backend == "right")
    fast(x)
    assert captured == [["right"], ["slow"]]
    with inr_kernels.backend("reference"):
        fast(x)
    assert captured[2:] == [["reference"]]
