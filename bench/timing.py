"""Times calls: on a CPU by the clock, on a GPU by CUDA events, also with a cold L2 cache and as a CUDA graph."""

import functools
import statistics
import time

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLUSH = 256 << 20  # bytes, several times the largest L2
BUDGET, CPU_BUDGET = 0.3, 0.05  # seconds of one figure
MIN_ROUNDS, MAX_ROUNDS = 5, 200


def synchronize():
    """Waits until the GPU is idle; nothing on a CPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median(run):
    """Returns the median seconds of `run()`, over calls that last 50 ms on a CPU and 0.3 s on a GPU in all."""
    return statistics.median(gpu_rounds(run) if DEVICE == "cuda" else _cpu_rounds(run))


def _cpu_rounds(run):
    times, end = [], time.perf_counter() + CPU_BUDGET
    while not times or (len(times) < MAX_ROUNDS and time.perf_counter() < end):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


@functools.cache
def _flush_buffer():
    return torch.empty(FLUSH, dtype=torch.int8, device="cuda")


def gpu_rounds(run, cold=False):
    """Returns the seconds of every round by CUDA events: five to estimate the time, then as many as fit the budget.

    All rounds are enqueued before the first is waited for, which hides the launch overhead.
    cold: every round starts with an L2 cache full of other data.
    """
    run()
    times = _timed(run, cold, MIN_ROUNDS)
    rounds = min(MAX_ROUNDS, int(BUDGET / statistics.median(times)))
    return _timed(run, cold, rounds) if rounds > MIN_ROUNDS else times


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


def record(run):
    """Returns a function that replays `run`'s kernels as a CUDA graph."""
    from inr_kernels.models.common import graphs

    return graphs.record(run, "cuda")[1]


def graphed(run):
    """Returns `record(run)`, or None where `run` cannot be captured."""
    try:
        return record(run)
    except RuntimeError:  # it synchronizes with the GPU
        return None


def figures(run, small=False):
    """Returns {"seconds", "spread", "rounds"} of a call on a GPU; small: also "cold_seconds" and "graph_seconds"."""
    times = gpu_rounds(run)
    quarter = statistics.quantiles(times, n=4)
    found = {"seconds": statistics.median(times), "spread": quarter[2] - quarter[0], "rounds": len(times)}
    if small:
        found["cold_seconds"] = statistics.median(gpu_rounds(run, cold=True))
        if replay := graphed(run):
            found["graph_seconds"] = statistics.median(gpu_rounds(replay))
    return found
