"""The calls on which `inr-kernels prove` tries the kernels of elementwise_filter."""

from collections.abc import Iterator

import torch

from inr_kernels._core.proof.problems import Problem

from .arguments import output_size

_HIGH_PASS = {"alpha": 2.0, "beta": 0.0, "gamma": -1.0}  # DEAR's
_ALL_TERMS = {"alpha": 0.5, "beta": 0.25, "gamma": 2.0}


def elementwise_filter(large: bool) -> Iterator[Problem]:
    """DEAR's filter, and paddings, grids and sizes around it."""
    channels, size = (64, (96, 96)) if large else (8, (33, 40))
    for sides in (3, 5, 7):
        for normalize in ("taps", "none", "all"):

            def problem(name, shape, groups, kernel_size=(sides, sides), normalize=normalize, **options):
                return _problem(name, shape, groups, kernel_size, options | {"normalize": normalize})

            yield problem("DEAR's", (2, channels, *size), channels, **_HIGH_PASS)
            yield problem("reflected", (1, 2, *size), 1, padding="reflect", **_ALL_TERMS)
            yield problem("reflected, dilated", (1, 6, 17, 23), 3, padding="reflect", dilation=2, **_ALL_TERMS)
            yield problem("replicated, with stride", (2, 6, 11, 40), 1, padding="replicate", stride=2, **_ALL_TERMS)
            yield problem("without padding", (1, 5, 21, 19), 5, padding="valid", **_ALL_TERMS)
            yield problem("two dilations", (1, 4, 33, 40), 2, dilation=(1, 2), **_ALL_TERMS)
            yield problem("upscaled, two dilations", (1, 4, 5, 21), 2, upscale=2, dilation=(1, 2))
            yield problem("one pixel", (3, 2, 1, 1), 2)
            yield problem("one row of taps", (1, 3, 9, 67), 3, kernel_size=(1, sides * sides))


def _problem(name, shape, groups, kernel_size, options):
    def build(device):
        dilation = options.get("dilation", 1)
        grid = options.get("stride", 1), options.get("upscale", 1), options.get("padding", "zeros")
        out = output_size(shape[2:], kernel_size, dilation if isinstance(dilation, int) else 1, *grid)
        taps = groups * kernel_size[0] * kernel_size[1]
        x, kernel = (
            torch.randn(shape, dtype=torch.float64, device=device),
            torch.randn(shape[0], taps, *out, dtype=torch.float64, device=device),
        )
        window = (
            None if options["normalize"] == "none" else torch.randn(kernel_size, dtype=torch.float32, device=device)
        )
        given = {"kernel_size": kernel_size, "groups": groups, "log_window": window}
        return (x, kernel), options | given

    return Problem(name, build)
