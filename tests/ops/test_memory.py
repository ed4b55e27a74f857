"""Tests the memory pool for the kernels' working memory and for gradients."""

import copy
import io
import pickle
import threading

import pytest
import torch

from inr_kernels import _C, elementwise_filter, release_memory
from inr_kernels._core import native
from inr_kernels.fourier_unit import conv3x3

pytestmark = pytest.mark.alone


def gradients(seed=0):
    """Gradients of a problem that depends on the seed, allocated from the pool."""
    generator = torch.Generator().manual_seed(seed)
    x, kernel = (torch.randn(1, c, 40, 40, generator=generator, requires_grad=True) for c in (4, 36))
    out = elementwise_filter(x, kernel, kernel_size=3, backend="cpu")
    return torch.autograd.grad(out.square().sum(), (x, kernel))


def test_pool_memory_is_filled_with_nan():
    """Tests the fixture that makes unwritten gradients visible in all other tests."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert native.empty_like(torch.ones(2, 3, dtype=dtype)).isnan().all()


def test_only_large_outputs_are_in_the_pool():
    like, large = torch.ones(1, dtype=torch.bfloat16), (2, 1024, 8192)
    for shape in (large, (3, 5), (0, 4)):
        out = native.empty(shape, like)
        assert out.shape == shape and out.dtype == like.dtype and out.is_contiguous() and out.isnan().all()
        assert out.untyped_storage().resizable() == (shape != large) and not out._is_view()


def test_large_outputs_can_be_changed_in_place():
    x, weight = torch.randn(1, 16, 768, 704), torch.randn(16, 16, 3, 3, requires_grad=True)
    out = conv3x3(x, weight)
    assert not out.untyped_storage().resizable()
    torch.relu_(out).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_live_gradients_keep_their_memory():
    first = gradients(0)
    copies = [g.clone() for g in first]
    gradients(1)
    second = gradients(1)
    assert len({g.data_ptr() for g in (*first, *second)}) == 4
    assert all(torch.equal(g, c) for g, c in zip(first, copies, strict=True))


def test_gradients_can_be_copied_pickled_and_shared():
    grad = gradients()[0]
    expected, file = grad.clone(), io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    for other in (copy.deepcopy(grad), pickle.loads(pickle.dumps(grad)), torch.load(file), grad.share_memory_()):
        assert torch.equal(other, expected)
    leaf = torch.randn(1, 4, 9, 9, requires_grad=True)
    for _ in range(2):  # accumulates
        elementwise_filter(
            leaf, torch.ones(1, 36, 9, 9), kernel_size=3, normalize="none", backend="cpu"
        ).sum().backward()
    assert leaf.grad[0, 0, 4, 4] == 2 * 9


def test_gradients_of_several_python_threads():
    expected, wrong = [gradients(i) for i in range(4)], []

    def work(i):
        for _ in range(20):
            if not all(torch.equal(g, e) for g, e in zip(gradients(i), expected[i], strict=True)):
                wrong.append(i)
            release_memory()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_in_a_forked_child(in_a_fork):
    assert in_a_fork(lambda: gradients()[1], threads=1)


def test_cached_memory_is_bounded_and_can_be_released(run_python):
    code = """if True:
        import ctypes, torch
        from pathlib import Path
        from inr_kernels import _C, release_memory
        def resident():
            ctypes.CDLL(None).malloc_trim(0)
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        def fill(megabytes):
            torch.frombuffer(_C.Memory(int(megabytes * 2**20)), dtype=torch.uint8).fill_(1)
        fill(1)
        release_memory()
        start = resident()
        for i in range(300):
            fill(0.1 + i / 40)
        cached = resident() - start
        fill(500)
        large = resident() - start - cached
        release_memory()
        print(cached, large, resident() - start)
    """
    cached, large, after = map(float, run_python(code).split())
    assert 16 < cached < 144, "128 MB, and what the system allocator caches"
    assert large < 16, "larger buffers are not cached"
    assert after < 16


def test_allocation_failure_raises():
    for size in (2**46, 2**63 - 1, 2**64 - 1):
        with pytest.raises(MemoryError, match=f"cannot allocate {size} bytes"):
            _C.Memory(size)
