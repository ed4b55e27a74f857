"""The calls on which `inr-kernels prove` tries the kernels of local_implicit, local_texture and mlp.

Every hidden unit is far from its ReLU's corner, which rounding would cross at random.
"""

import itertools
from collections.abc import Iterator

import torch

from inr_kernels._core.proof.problems import Problem


def local_implicit(large: bool) -> Iterator[Problem]:
    """LIIF's and IN²'s decoders, and widths, flags and places of the queries around them."""
    size, queries, channels = ((48, 48), 1 << 14, 64) if large else ((12, 13), 500, 16)
    for place, width in itertools.product(("last", "first"), (256, 128, 64, 320)):

        def problem(name, size, queries, hidden, *args, place=place, **options):
            return _decoder(name, size, queries, hidden, *args, ensemble_after=place, **options)

        yield problem("LIIF's", size, queries, (width,) * 4, channels)
        yield problem("ragged, one pixel", (1, 1), 33, (width - 27, width), out=5)
        yield problem(
            "no ensemble, unfolding or cell", (9, 1), 61, (width, 20), ensemble=False, unfold=False, cell=False
        )
        yield problem("shallow, far outside, wide output", (6, 7), 129, (width - 1,), out=70, spread=4.0)
        yield problem("one query, without a cell", (5, 4), 1, (20, width), cell=False)


def _decoder(
    name, size, queries, hidden, channels=5, out=3, spread=1.2, ensemble=True, unfold=True, cell=True, **place
):
    def build(device):
        feat = torch.randn(2, channels, *size, dtype=torch.float64, device=device)
        coord, cells = _queries(2, queries, spread, device)
        inputs = [channels * (9 if unfold else 1) + 2, *hidden]
        if cell:
            inputs[1 if place["ensemble_after"] == "first" else 0] += 2
        weights, biases = _layers(inputs, [*hidden, out], device)
        options = place | {"feat_unfold": unfold, "local_ensemble": ensemble}
        return (feat, coord, cells if cell else None, weights, biases), options

    return Problem(name, build)


def local_texture(large: bool) -> Iterator[Problem]:
    """LTE's decoder, and widths and sizes around it."""
    size, queries = ((48, 48), 1 << 14) if large else ((12, 13), 500)
    for width in (256, 128, 64, 320):
        yield _texture("LTE's", size, queries, width // 2, (width,) * 3)
        yield _texture("ragged, one column", (9, 1), 33, 21, (width - 27, 20, width), out=5)
        yield _texture("one Linear, wide output", (5, 6), 61, width // 2 - 1, (), out=70)
        yield _texture("one frequency, one pixel, far outside", (1, 1), 129, 1, (width,), spread=3.0)


def _texture(name, size, queries, frequencies, hidden, out=3, spread=1.2):
    def build(device):
        maps = [torch.randn(2, 2 * frequencies, *size, dtype=torch.float64, device=device) for _ in range(2)]
        phase = torch.randn(frequencies, 2, dtype=torch.float64, device=device)
        weights, biases = _layers([2 * frequencies, *hidden], [*hidden, out], device)
        return (*maps, *_queries(2, queries, spread, device), phase, weights, biases), {}

    return Problem(name, build)


def _queries(batch, queries, spread, device):
    coord = (torch.rand(batch, queries, 2, dtype=torch.float32, device=device) * 2 - 1) * spread
    return coord, torch.rand(batch, queries, 2, dtype=torch.float32, device=device) / 5


def _layers(inputs, widths, device):
    """Weights and biases; the hidden layers' units are far above or far below 0."""
    pairs = list(zip(widths, inputs, strict=True))
    weights = [torch.randn(n, k, dtype=torch.float64, device=device) / k**0.5 for n, k in pairs]
    biases = [torch.randn(n, dtype=torch.float64, device=device) / 4 for n in widths]
    for i in range(len(widths) - 1):
        weights[i] = weights[i] * 0.3
        far = torch.arange(widths[i], dtype=torch.float64, device=device) % 3 > 0
        biases[i] = biases[i] + 8.0 * far - 4.0
    return weights, biases


def mlp(large: bool) -> Iterator[Problem]:
    """IN²'s multi-layer perceptron, and widths, activations and numbers of layers around it."""
    rows, width = (4096, 256) if large else (300, 48)
    yield _mlp("IN²'s", (2, rows), (width, 4 * width, width), norm=True, add=True)
    yield _mlp("one layer", (rows,), (width, 3 * width))
    yield _mlp("ragged, ReLU", (3, 7), (19, 41, 33, 5), activation="relu", add=True)
    yield _mlp("one row", (), (5, 1, 3), norm=True)


def _mlp(name, rows, widths, norm=False, add=False, **options):
    def build(device):
        def normal(*shape):
            return torch.randn(shape, dtype=torch.float64, device=device)

        weights, biases = _layers(widths[:-1], widths[1:], device)
        given = {"norm_weight": normal(widths[0]), "norm_bias": normal(widths[0])} if norm else {}
        given |= {"add": normal(*rows, widths[-1])} if add else {}
        return (normal(*rows, widths[0]), weights, biases), given | options

    return Problem(name, build)
