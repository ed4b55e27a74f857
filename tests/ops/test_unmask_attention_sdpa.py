"""The backend "sdpa" of unmask_attention: its function on CPU tensors; its choice, on a made-up GPU."""

import threading
from dataclasses import replace

import made_up
import pytest
import torch
from unmask_attention_cases import HOLES, Case, assert_kernel_as_accurate

from inr_kernels import unmask_attention
from inr_kernels._core import dispatch, verdicts
from inr_kernels._core.dispatch import OPS, always
from inr_kernels._core.verdicts import Verdict
from inr_kernels.unmask_attention.arguments import Facts
from inr_kernels.unmask_attention.op import sdpa

OP = OPS["unmask_attention"]
HALF = Facts(torch.device("cpu"), torch.bfloat16, 64)


@pytest.fixture(autouse=True)
def runs_on_the_cpu(monkeypatch):
    monkeypatch.setitem(OP.backends, "sdpa", replace(OP.backends["sdpa"], why_not=always))


@pytest.mark.parametrize("mask_keys", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_eager(dtype, mask_keys):
    """In float64 too, which the backend does not take: a CPU's float32 attention may use a rough exponential."""
    for hole in HOLES if dtype == torch.float64 else ("some", "mixed"):
        assert_kernel_as_accurate(Case((2, 33, 13, 17), hole, mask_keys), dtype, "sdpa")
    assert_kernel_as_accurate(Case((1, 3, 1, 1), "mixed", mask_keys), dtype, "sdpa")
    assert_kernel_as_accurate(Case((2, 64, 5, 7), "mixed", mask_keys, scale=0.4), dtype, "sdpa")


@pytest.mark.parametrize("mask_keys", [False, True])
def test_nan_and_the_same_bits(mask_keys):
    """NaN reaches holes in its channel only, by the mean; with `mask_keys`, what a hole holds reaches no pixel."""
    feat, mask = torch.randn(1, 3, 2, 4).half(), torch.zeros(1, 1, 2, 4)
    mask[..., 0] = 1
    feat[:, 1, 0, 0] = torch.nan
    results = [unmask_attention(feat, mask, mask_keys=mask_keys, backend=name) for name in ("sdpa", "reference")]
    assert torch.equal(*(result[..., 0].isnan() for result in results))
    assert results[0][..., 0].isnan().any() != mask_keys
    case = Case((1, 8, 5, 7), mask_keys=mask_keys)
    assert all(map(torch.equal, case.run(torch.float16, "sdpa"), case.run(torch.float16, "sdpa")))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_backward_is_deterministic_and_restores_the_mode(deterministic, monkeypatch):
    seen, attend = [], sdpa._attend
    monkeypatch.setattr(
        sdpa, "_attend", lambda *a: (seen.append(torch.are_deterministic_algorithms_enabled()), attend(*a))[1]
    )
    torch.use_deterministic_algorithms(deterministic)
    try:
        Case((1, 8, 3, 4)).run(torch.float16, "sdpa")
        assert seen == [deterministic, True]
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)


CALLS = {  # device, dtype, channels -> the reason
    "cpu": (Facts(torch.device("cpu"), torch.float16, 64), "it takes CUDA tensors; these are on cpu"),
    "float32": (Facts(torch.device("cuda:0"), torch.float32, 64), "it takes bfloat16 and float16; got float32"),
    "channels": (Facts(torch.device("cuda:0"), torch.float16, 257), "it takes up to 256 channels; got 257"),
    "old": (Facts(torch.device("cuda:0"), torch.float16, 256), "it needs compute capability 8.0; this GPU has 7.5"),
}


@pytest.mark.parametrize("name", CALLS)
def test_why_not(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    facts, reason = CALLS[name]
    assert sdpa.why_not(facts) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert sdpa.why_not(CALLS["old"][0]) == ""


def verdict(backend, reason="", seconds=1e-3):
    return Verdict("unmask_attention", backend, "bfloat16", HALF.form, reason, (seconds, seconds), (2e-3, 2e-3))


@pytest.mark.parametrize(
    ("found", "default"),
    [
        ([], "sdpa"),
        ([verdict("triton")], "triton"),
        ([verdict("triton", "wrong")], "sdpa"),
        ([verdict("triton", "wrong"), verdict("sdpa", "slow")], "reference"),
        ([verdict("triton"), verdict("sdpa", seconds=5e-4)], "sdpa"),
        ([verdict("triton", seconds=5e-4), verdict("sdpa")], "triton"),
    ],
)
def test_the_default_on_a_gpu(found, default, tmp_path, monkeypatch):
    monkeypatch.setitem(OP.backends, "triton", replace(OP.backends["triton"], why_not=always))
    monkeypatch.setattr(verdicts, "of_call", lambda op, facts: found)
    with made_up.installed():
        assert OP.default(HALF) == OP.default(HALF, backward=True) == default


def test_the_default_advises_to_prove_once(monkeypatch, tmp_path, recwarn):
    monkeypatch.setattr(verdicts, "file", lambda: tmp_path / "verdicts.json")
    monkeypatch.setattr(verdicts, "_tables", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(OP, "_chosen", {})
    feat, mask = torch.randn(1, 64, 3, 4).bfloat16(), torch.zeros(1, 1, 3, 4)
    with made_up.installed():
        with pytest.warns(UserWarning, match="unmask_attention runs on plain PyTorch: .*Run `inr-kernels prove`"):
            out = unmask_attention(feat, mask)
        assert torch.equal(out, unmask_attention(feat, mask, backend="sdpa"))
        assert torch.equal(out, unmask_attention(feat, mask))  # without a second warning: they are errors here


def test_the_mode_is_set_by_one_thread_at_a_time():
    """Or the last of two threads would restore the other's mode."""
    barrier = threading.Barrier(2)

    def work():
        barrier.wait()
        for _ in range(200):
            with sdpa._deterministic():
                pass

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.are_deterministic_algorithms_enabled()
