"""The calls on which the made-up op is proven."""

import torch

from inr_kernels._core.proof.problems import Problem


def made_up(large):
    """Two sizes."""
    for size in (5, 3):
        yield Problem(
            f"{size} numbers", lambda device, size=size: ((torch.randn(size, dtype=torch.float64, device=device),), {})
        )
