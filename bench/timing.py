"""How long a call takes on a GPU: warm, with a cold L2 cache, and as a CUDA graph. (A CPU is pytest-benchmark's.)"""

import functools
import statistics

import torch

from inr_kernels.models.graphs import record

FLUSH = 256 << 20  # bytes, several times the largest L2
BUDGET = 0.3  # seconds for the rounds of one figure


@functools.cache
def _flush_buffer():
    return torch.empty(FLUSH, dtype=torch.int8, device="cuda")


def gpu_rounds(run, cold=False, least=7, most=200):
    """Seconds of every round by CUDA events, one after the other, so that launches hide behind what runs.

    cold: every round starts from an L2 cache that holds something else.
    """
    events, spent = [], 0.0
    run()
    torch.cuda.synchronize()
    while len(events) < least or (spent < BUDGET and len(events) < most):
        some = []
        for _ in range(min(least, 20)):
            if cold:
                _flush_buffer().zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            some.append((start, end))
        torch.cuda.synchronize()
        events += some
        spent += sum(start.elapsed_time(end) for start, end in some) / 1e3
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def graphed(run):
    """`run`'s kernels as one CUDA graph to replay, or None where they cannot be captured."""
    try:
        return record(run, "cuda")[1]
    except RuntimeError:  # it waits for the GPU
        return None


def figures(run, small=False):
    """{"seconds", "spread", "rounds"} of a call on a GPU; of a small one "cold_seconds" and "graph_seconds", too."""
    times = gpu_rounds(run)
    quarter = statistics.quantiles(times, n=4)
    found = {"seconds": statistics.median(times), "spread": quarter[2] - quarter[0], "rounds": len(times)}
    if small:
        found["cold_seconds"] = statistics.median(gpu_rounds(run, cold=True))
        if replay := graphed(run):
            found["graph_seconds"] = statistics.median(gpu_rounds(replay))
    return found
