"""Tests which threads the C++ kernels use: those of torch's OpenMP, except in a forked child."""

import os

import pytest
import torch

from inr_kernels import _C

pytestmark = pytest.mark.alone


def test_uses_openmp_except_in_a_forked_child(in_a_fork):
    """OpenMP's threads do not exist in a forked child."""
    parent = os.getpid()
    assert _C.has_openmp()
    assert in_a_fork(lambda: torch.tensor(_C.has_openmp() == (os.getpid() == parent)))


def test_first_kernel_call_in_a_forked_child(run_python):
    """The parent has used torch's threads, but has not called a kernel."""
    code = """if True:
        import os, signal, torch, inr_kernels
        torch.set_num_threads(2)
        torch.rand(1 << 20).exp()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            inr_kernels.elementwise_filter(torch.rand(1, 8, 64, 64), torch.rand(1, 72, 64, 64), kernel_size=3)
            os._exit(0)
        print(os.waitpid(child, 0)[1])
    """
    assert run_python(code).strip() == "0"
