"""The choice of the backend, with local_implicit as the op: precedence, errors, `explain`, the fallback's warning."""

import dataclasses
import os
import re
from types import SimpleNamespace

import pytest
import torch
from local_implicit_cases import Case
from op_backends import backends_of

import inr_kernels
from inr_kernels import LocalImplicitDecoder, explain, local_implicit_decode
from inr_kernels._core import backends, devices, dispatch, native
from inr_kernels.local_implicit import op, reference


def arguments():
    """The arguments of a valid call."""
    feat, coord, cell, weights, biases = Case().cast(torch.float32)
    return {"feat": feat, "coord": coord, "cell": cell, "weights": weights, "biases": biases}


@pytest.mark.parametrize("name", dispatch.OPS)
def test_the_tests_run_every_kernel(name):
    """Tests that run each of `backends_of` an op would pass without the kernels that cannot run here."""
    interpreted = {"triton"} if os.environ.get("TRITON_INTERPRET") == "1" else set()
    assert {"cpu", "reference"} | interpreted <= set(backends_of(name))


def test_backend_precedence(monkeypatch):
    args = arguments()
    seen = []
    for name in ("cpu", "reference"):
        entry = op.OP.backends[name]
        spy = lambda a, name=name, entry=entry: (seen.append(name), entry.forward(a))[1]  # noqa: E731
        monkeypatch.setitem(op.OP.backends, name, dataclasses.replace(entry, forward=spy))
    literal = reference.local_implicit
    monkeypatch.setattr(reference, "local_implicit", lambda *a, **k: (seen.append("reference"), literal(*a, **k))[1])
    monkeypatch.setenv("INR_KERNELS_BACKEND", "reference")
    local_implicit_decode(**args)
    with inr_kernels.backend("cpu"):
        local_implicit_decode(**args)
        local_implicit_decode(**args, backend="reference")
    monkeypatch.delenv("INR_KERNELS_BACKEND")
    local_implicit_decode(**args)
    assert seen == ["reference", "cpu", "reference", "cpu"]
    with pytest.raises(ValueError, match="name must be one of"), inr_kernels.backend("cuda9"):
        pass


def test_requested_backend_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run local_implicit: it takes CUDA tensors"):
        local_implicit_decode(**arguments(), backend="triton")


@pytest.mark.parametrize(("name", "error"), [("foo", ValueError), ("triton", RuntimeError)])
def test_errors_name_the_environment_variable(monkeypatch, name, error):
    """If it holds the requested name."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("INR_KERNELS_BACKEND", name)
    with pytest.raises(error, match=rf"{name}' \(as in the environment variable INR_KERNELS_BACKEND\)"):
        local_implicit_decode(**arguments())
    monkeypatch.delenv("INR_KERNELS_BACKEND")
    with pytest.raises(error, match=name) as raised:
        local_implicit_decode(**arguments(), backend=name)
    assert "INR_KERNELS_BACKEND" not in str(raised.value)


def test_explain_marks_the_requested_backend(monkeypatch, capsys):
    def marked(**options):
        return re.findall(r"^  (\w+) .*<- (.*)$", explain("local_implicit", torch.zeros(1, 1, 1, 1), **options), re.M)

    assert marked() == [("cpu", "default")] and marked(backend="reference") == [("reference", "requested")]
    monkeypatch.setenv("INR_KERNELS_BACKEND", "reference")
    assert marked() == [("reference", "requested by INR_KERNELS_BACKEND")]
    with inr_kernels.backend("cpu"):
        assert marked() == [("cpu", "requested")]


def test_explain(capsys):
    args = arguments()
    text = explain(local_implicit_decode, *args.values())
    assert capsys.readouterr().out.strip() == text
    assert "cpu        runs  <- default" in text
    assert text == explain("local_implicit", **args)
    with pytest.raises(ValueError, match="op must be one of"):
        explain(print)


def test_slow_fallback_warns_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(native, "load", lambda: (None, "not built"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = arguments()
    with pytest.warns(UserWarning, match="slow PyTorch reference.*not built"):
        out = local_implicit_decode(**args)
    assert torch.equal(out, local_implicit_decode(**args))  # no second warning: they are errors here
    decoder, feat = LocalImplicitDecoder(5, hidden=(9, 8)), args["feat"]
    runs = []
    for backend in (None, "reference"):  # the op's fallback, and the reference called directly
        loss = decoder(feat, args["coord"], args["cell"], backend=backend).square().sum()
        runs.append(torch.autograd.grad(loss, list(decoder.parameters())))
    for fallback, literal in zip(*runs, strict=True):
        torch.testing.assert_close(fallback, literal, rtol=1e-4, atol=1e-5)


def test_explain_takes_tensors_without_data():
    text = inr_kernels.explain("local_implicit", torch.zeros(1, 4, 3, 3, device="meta"))
    assert text.startswith("local_implicit on meta, float32\n") and "it takes CPU tensors; these are on meta" in text


def test_precision_set_by_either_function_of_torch(monkeypatch):
    assert devices.float32_precision() == "ieee"
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert devices.float32_precision() == "tf32"
    torch.set_float32_matmul_precision(old)

    def refuses():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    for precision in ("tf32", "ieee"):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
        assert devices.float32_precision() == precision


def test_tensors_are_cached_except_during_a_graph_capture(monkeypatch):
    capturing, made, gpu = [], [], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    cache = backends.TensorCache(lambda *key: made.append(key) or len(made), 32)
    capturing.append(True)
    assert [cache(3, 5, gpu) for _ in range(2)] == [1, 2]
    capturing.clear()
    assert [cache(3, 5, gpu) for _ in range(2)] == [3, 3]
    assert [cache(3, 6, gpu) for _ in range(2)] == [4, 4]
    capturing.append(True)
    assert cache(3, 5, gpu) == 3
    capturing.clear()
    for height in range(100):
        cache(height, 7, gpu)
    assert len(cache) == 33
    assert cache(3, 5, gpu) == 3, "a graph reads them"
    assert cache(3, 6, gpu) > 4
    cache.clear()
    assert len(cache) == 0
