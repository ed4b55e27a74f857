"""What this machine can do at best: a large matrix product and a large copy, measured."""

import time

import torch


def synchronize(device):
    """Waits for everything that the device was asked to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run, device, rounds=15):
    """The shortest time of `run()`, after one call to warm up: a ceiling is what the machine has shown it can do."""
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def gemm_flops(device, dtype, n=None):
    """FLOP/s of torch's product of two square matrices (8192 on a GPU, 2048 on a CPU)."""
    n = n or (8192 if torch.device(device).type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / best_seconds(lambda: a @ b, device)


def copy_bytes(device, size=1 << 28):
    """Bytes/s, read and written, of a copy of `size` bytes."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)
