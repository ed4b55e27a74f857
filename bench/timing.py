"""How long a call takes on a GPU: warm, with a cold L2 cache, and as a CUDA graph. (A CPU is pytest-benchmark's.)"""

import functools
import statistics

import torch

from inr_kernels.models.common.graphs import record

FLUSH = 256 << 20  # bytes, several times the largest L2
BUDGET, LEAST, MOST = 0.3, 5, 200  # seconds and rounds for one figure


@functools.cache
def _flush_buffer():
    return torch.empty(FLUSH, dtype=torch.int8, device="cuda")


def gpu_rounds(run, cold=False):
    """Seconds of every round by CUDA events: five to see how long it takes, then as many as fit the budget.

    All are started before any is waited for, so that launches hide behind what runs.
    cold: every round begins with an L2 cache that holds something else.
    """
    run()
    times = _timed(run, cold, LEAST)
    rounds = min(MOST, int(BUDGET / statistics.median(times)))
    return _timed(run, cold, rounds) if rounds > LEAST else times


def _timed(run, cold, rounds):
    torch.cuda.synchronize()
    events = []
    for _ in range(rounds):
        if cold:
            _flush_buffer().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
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
