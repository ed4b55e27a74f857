"""The calls on which `inr-kernels prove` tries the kernels of unmask_attention."""

from collections.abc import Iterator

import torch

from inr_kernels._core.proof.problems import Problem


def unmask_attention(large: bool) -> Iterator[Problem]:
    """DEAR's attention, and masks, sizes and numbers of channels around it."""
    side = 64 if large else 24
    for channels in (64, 128, 256, 300):
        yield _problem("DEAR's", (2, channels, side, side), 0.4)
        yield _problem("soft mask of keys", (2, channels - 31, 13, 17), None, mask_keys=True)
        yield _problem("everything is known", (1, channels, 11, 6), 0.0, scale=0.3)
        yield _problem("everything is a hole", (2, channels, 5, 7), 1.0)
        yield _problem("one pixel", (3, channels - 1, 1, 1), 0.0)


def _problem(name, shape, holes, **options):
    """holes: the share of the mask that is 1; None: any value."""

    def build(device):
        feat, mask = (
            torch.randn(shape, dtype=torch.float64, device=device),
            torch.rand(shape[0], 1, *shape[2:], dtype=torch.float32, device=device),
        )
        return (feat, mask if holes is None else mask < holes), options

    return Problem(name, build)
