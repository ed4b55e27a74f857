"""local_implicit in CUDA C++: its source in an emulation on the host; what only a GPU can show is marked."""

import emulated_cuda
import pytest
import torch
from local_implicit_cases import Case, assert_as_accurate

from inr_kernels._core import dispatch, native

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
CASES = {
    "LIIF": {},
    "first": {"ensemble_after": "first"},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated_cuda.build(tmp_path_factory.mktemp("cuda"), "local_implicit.cu", "local_implicit_weights.cu")


@pytest.fixture
def on_host(library, monkeypatch):
    """backend="cuda" runs on CPU tensors, in the emulation."""
    monkeypatch.setitem(dispatch.OPS["local_implicit"].backends, "cuda", lambda facts: "")
    monkeypatch.setattr(native, "load", lambda: (emulated_cuda.Native(library), ""))


@HALVES
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_eager(case, dtype, on_host):
    case = Case(**CASES[case])
    truth = case.decode(torch.float64, "reference", rounded=dtype)
    assert_as_accurate(case.decode(dtype, "cuda"), case.decode(dtype, "reference"), truth)
