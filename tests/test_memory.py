"""What the C++ kernels keep between calls: the memory of the next, never without bound."""

MEGABYTES = """
import gc, os, torch, inr_kernels
from pathlib import Path

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

def gradients(channels, side):
    x = torch.ones(1, channels, side, side, requires_grad=True)
    kernel = torch.zeros(1, 9 * channels, side, side, requires_grad=True)
    out = inr_kernels.elementwise_filter(x, kernel, kernel_size=3, normalize="taps", backend="cpu")
    return torch.autograd.grad(out.sum(), [x, kernel])

gradients(1, 8)
"""


def test_memory_is_kept_for_the_next_call_and_released(run_python):
    code = MEGABYTES + (
        "first = gradients(256, 64)[1].data_ptr()\n"  # 36 MB
        "assert gradients(256, 64)[1].data_ptr() == first\n"
        "kept = resident()\n"
        "inr_kernels.release_memory()\n"
        "print(kept - resident())"
    )
    assert float(run_python(code)) > 30


def test_a_gradient_is_nobody_elses_while_it_lives(run_python):
    code = MEGABYTES + (
        "held = [gradients(64, 32)[1] for _ in range(5)]\n"
        "assert len({g.data_ptr() for g in held}) == 5\n"
        "copies = [g.clone() for g in held]\n"
        "gradients(64, 33), gradients(64, 32)\n"
        "print(all(torch.equal(a, b) for a, b in zip(held, copies)))"
    )
    assert run_python(code).strip() == "True"


def test_what_is_kept_is_bounded(run_python):
    code = MEGABYTES + (
        "before = resident()\nfor side in range(40, 104):\n    gradients(64, side)\nprint(resident() - before)"
    )
    assert float(run_python(code)) < 64 + 32
