"""Which backends of an op the tests run."""

import torch

from inr_kernels._core.dispatch import OPS


def backends_of(name):
    """The names of the op's backends that run on float32 tensors on this machine's CPU."""
    op = OPS[name]
    facts = op.facts(torch.empty(1, 1, 1, 1))
    return [backend for backend, implementation in op.backends.items() if not implementation.why_not(facts)]
