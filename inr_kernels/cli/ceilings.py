"""Measures the peak rates of this machine: a large matrix product and a large copy."""

import time
from collections.abc import Callable

import torch


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


def copy_bytes(device: torch.device | str, size: int | None = None) -> float:
    """Bytes/s, read plus written, of a copy of `size` bytes of random numbers (1 GB on a GPU, 256 MB on a CPU)."""
    size = size or (1 << 30 if torch.device(device).type == "cuda" else 1 << 28)
    source = torch.rand(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)
