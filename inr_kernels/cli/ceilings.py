"""What this machine can do at best: a large matrix product and a large copy, measured."""

import time

import torch


def synchronize(device):
    """Waits for everything that the device was asked to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run, device, rounds=15):
    """The shortest time of `run()`, after one call to warm up: a ceiling is what the machine has shown it can do."""
    once = _once_on_gpu if torch.device(device).type == "cuda" else _once
    return min([once(run, device) for _ in range(rounds + 1)][1:])


def _once(run, device):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _once_on_gpu(run, device):
    """By the GPU's own clock: to start a kernel takes as long as to copy some megabytes."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def gemm_flops(device, dtype, n=None):
    """FLOP/s of torch's product of two square matrices (8192 on a GPU, 2048 on a CPU)."""
    n = n or (8192 if torch.device(device).type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / best_seconds(lambda: a @ b, device)


def copy_bytes(device, size=None):
    """Bytes/s, read and written, of a copy of `size` bytes (1 GB on a GPU, 256 MB on a CPU) of random numbers."""
    size = size or (1 << 30 if torch.device(device).type == "cuda" else 1 << 28)
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)
