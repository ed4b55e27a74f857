"""Measures the peak rates of this machine: of its multiply-add units, a large matrix product and a large copy."""

import functools
import time
from collections.abc import Callable

import torch

from inr_kernels._core import backends, native


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has finished all its work; does nothing for a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run: Callable[[], object], device: torch.device | str, rounds: int = 15) -> float:
    """The shortest time of `run()` in several rounds, after one call to warm up."""
    once = _once_on_gpu if torch.device(device).type == "cuda" else _once
    return min([once(run, device) for _ in range(rounds + 1)][1:])


def _once(run, device):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _once_on_gpu(run, device):
    """Timed by CUDA events, without the launch, which takes as long as copying some megabytes."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def gemm_flops(device: torch.device | str, dtype: torch.dtype, n: int | None = None) -> float:
    """FLOP/s of torch's product of two n x n matrices (n: 8192 on a GPU, 2048 on a CPU)."""
    n = n or (8192 if torch.device(device).type == "cuda" else 2048)
    a, b = (torch.randn(n, n, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / best_seconds(lambda: a @ b, device)


def multiply_add_flops(dtype: torch.dtype, steps: int = 2_000_000) -> float:
    """FLOP/s of this CPU's multiply-add units on torch's threads; 0 for a dtype that they do not multiply."""
    library, threads = native.load()[0], torch.get_num_threads()
    if library is None or dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return 0.0
    run = functools.partial(library.multiply_adds, type=backends.TYPES[dtype], steps=steps, threads=threads)
    try:
        return run() / best_seconds(run, "cpu", 5)
    except ValueError:  # no bfloat16 instructions
        return 0.0


def peak_flops(device: torch.device | str, dtype: torch.dtype, n: int | None = None) -> float:
    """FLOP/s that a kernel can reach: those of `gemm_flops`, or of a CPU's multiply-add units if they are more.

    A matrix product can be faster than those units, where there are units for matrices.
    """
    product = gemm_flops(device, dtype, n)
    return product if torch.device(device).type == "cuda" else max(product, multiply_add_flops(dtype))


def copy_bytes(device: torch.device | str, size: int | None = None) -> float:
    """Bytes/s, read plus written, of a copy of `size` bytes of random numbers (1 GB on a GPU, 256 MB on a CPU)."""
    size = size or (1 << 30 if torch.device(device).type == "cuda" else 1 << 28)
    source = torch.rand(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)
