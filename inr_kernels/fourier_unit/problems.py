"""The calls on which `inr-kernels prove` tries the kernels of fourier_unit, conv3x3 and conv2d."""

from collections.abc import Iterator

import torch

from inr_kernels._core.proof.problems import Problem


def fourier_unit(large: bool) -> Iterator[Problem]:
    """LaMa's unit, and sizes, groups and norms around it; on a GPU transforms to 64 are matrix products."""
    channels = 192 if large else 16
    for side in (64, 128):
        yield _unit("LaMa's", (2 if large else 1, channels, side, side), channels)
        yield _unit("training", (2, 6, side - 33, side - 1), 4, training=True, groups=2)
        yield _unit("another norm", (2, 5, side // 2 + 1, side - 4), 70, norm="forward")
        yield _unit("one row", (1, 3, 1, side - 31 if side == 64 else side), 2)
    yield _unit("one pixel", (2, 3, 1, 1), 2)


def _unit(name, shape, outputs, training=False, **options):
    def build(device):
        rows, columns = 2 * outputs, 2 * shape[1] // options.get("groups", 1)
        x = torch.randn(shape, dtype=torch.float64, device=device) + 0.5
        weight = torch.randn(rows, columns, dtype=torch.float64, device=device) / columns**0.5
        scale, shift = (
            torch.rand(rows, dtype=torch.float64, device=device) + 0.5,
            torch.randn(rows, dtype=torch.float64, device=device),
        )
        mean, var = torch.randn(2, rows, dtype=torch.float32, device=device)
        statistics = [] if training else [mean, var.abs() + 0.5]
        return (x, weight, scale, shift, *statistics), options | {"training": training}

    return Problem(name, build)


def conv3x3(large: bool) -> Iterator[Problem]:
    """LaMa's convolution, and sizes, paddings and inputs around it."""
    channels, side = (128, 64) if large else (24, 32)
    yield _convolution("LaMa's", (1, channels, side, side), channels, others=channels, add=True)
    yield _convolution("zeros around", (2, 5, 13, 17), 7, padding="zeros")
    yield _convolution("smallest", (2, 1, 2, 2), 1, others=3)


def _convolution(name, shape, outputs, others=0, add=False, **options):
    def build(device):
        batch, channels, *size = shape
        inputs = channels + others
        x = torch.randn(shape, dtype=torch.float64, device=device)
        weight = torch.randn(outputs, inputs, 3, 3, dtype=torch.float64, device=device) / (9 * inputs) ** 0.5
        bias = torch.randn(outputs, dtype=torch.float64, device=device)
        other = torch.randn(batch, others, *size, dtype=torch.float64, device=device) if others else None
        summand = torch.randn(batch, outputs, *size, dtype=torch.float64, device=device) if add else None
        return (x, weight, bias), options | {"other": other, "add": summand}

    return Problem(name, build)


def conv2d(large: bool) -> Iterator[Problem]:
    """LaMa's other convolutions, and sizes, strides and kernels around them."""
    channels, side = (64, 128) if large else (12, 16)
    half = {"stride": 2, "padding": 1}
    yield _other_convolution("to half the size", (1, channels, side, side), channels, 3, padding_mode="reflect", **half)
    yield _other_convolution(
        "transposed", (1, channels, side, side), channels, 3, transposed=True, output_padding=1, **half
    )
    yield _other_convolution("7 x 7", (2, channels, 19, 23), 3, 7, padding=3, padding_mode="reflect")
    yield _other_convolution("1 x 1", (2, channels, 9, 7), 5, 1)
    yield _other_convolution("other strides", (1, 5, 13, 17), 7, 2, stride=(3, 1), transposed=True)


def _other_convolution(name, shape, outputs, kernel, **options):
    def build(device):
        x, bias = (torch.randn(size, dtype=torch.float64, device=device) for size in (shape, outputs))
        pair = (shape[1], outputs) if options.get("transposed") else (outputs, shape[1])
        weight = torch.randn(*pair, kernel, kernel, dtype=torch.float64, device=device) / (kernel**2 * shape[1]) ** 0.5
        scale = torch.rand(outputs, dtype=torch.float64, device=device) + 0.5
        return (x, weight, bias), options | {"scale": scale}

    return Problem(name, build)
