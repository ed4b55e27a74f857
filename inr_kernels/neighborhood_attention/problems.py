"""The calls on which `inr-kernels prove` tries the kernels of neighborhood_attention."""

import functools
from collections.abc import Iterator

import torch

from inr_kernels._core.proof.problems import Problem

from . import functional


def neighborhood_attention(large: bool) -> Iterator[Problem]:
    """IN²'s attention, windows, strides and layouts around it; NAF's and AnyUp's, and forms between them."""
    size, heads = ((48, 48), 8) if large else ((20, 24), 2)
    for dim in (32, 64, 128, 160):
        yield _problem("IN²'s", (1, *size, heads, dim), 7, bias=True)
        yield _problem("packed, dilated", (1, 13, 19, 2, dim - 13), (3, 5), packed=True, dilation=(2, 3))
        yield _problem("causal, with stride", (2, 11, 23, 2, dim), (4, 6), stride=(2, 3), is_causal=(True, False))
        yield _problem("even window, causal columns", (1, 9, 20, 3, dim), 2, bias=True, is_causal=(False, True))
        yield _problem("one pixel", (2, 1, 1, 1, dim), 1, bias=True)
        yield _problem("additional keys", (2, 1, 90, 2, dim), (11, 1), key=(11, 1, 2), value=(2, dim))
        yield _problem("video, causal in time", (1, 5, 9, 20, 2, dim), 3, bias=True, is_causal=(True, False, False))
        yield _problem(
            "volume, dilated", (1, 6, 7, 9, 4, dim), (3, 2, 4), key=(6, 7, 9, 2), value=(1, dim), dilation=(2, 3, 2)
        )
        yield _problem("windows in each plane", (2, 3, 8, 9, 2, dim), (1, 3, 5), stride=(1, 2, 3))
        yield _problem("volume, shared heads", (1, 4, 5, 11, 4, dim), 2, key=(4, 5, 11, 2), value=(1, dim))
        for height, width in ((6, 5), (3, 4), (4, 7)):
            yield from _other_keys((height, width), (2 * height, 4 * width), dim)
    yield _problem("narrow head", (2, 9, 20, 3, 5), 5, bias=True, scale=0.7)
    yield _problem("head of 16", (2, 9, 20, 3, 16), 3, dilation=3)


def _other_keys(keys, queries, dim):
    """Problems with maps of these sizes, whose keys and values have fewer heads, another size or another width."""
    name = f"{keys[0]} x {keys[1]}"
    yield _problem(f"shared heads, {name}", (1, *queries, 4, dim), 3, key=(*queries, 2), value=(1, dim))
    yield _problem(f"cross-scale, {name}", (1, *queries, 2, dim), 3, key=(*keys, 2), value=(2, dim), bias=True)
    yield _problem(f"shared heads, cross-scale, {name}", (1, *queries, 4, dim), 3, key=(*keys, 2), value=(2, dim))
    for dim_v in {32, 96, 192} - {dim}:
        yield _problem(
            f"{dim_v} channels of values, {name}", (1, *queries, 2, dim), 3, key=(*queries, 2), value=(2, dim_v)
        )
        yield _problem(f"NAF's, {dim_v} channels, {name}", (1, *queries, 2, dim), 3, key=(*keys, 2), value=(2, dim_v))
        mean = {"mean_heads": True}
        yield _problem(
            f"mean of heads, {dim_v} channels, {name}",
            (1, *queries, 4, dim),
            3,
            key=(*queries, 4),
            value=(1, dim_v),
            **mean,
        )
        yield _problem(
            f"AnyUp's, {dim_v} channels, {name}",
            (1, *queries, 4, dim),
            3,
            key=(*keys, 4),
            value=(1, dim_v + 192),
            **mean,
        )


def _problem(name, shape, kernel_size, bias=False, packed=False, key=None, value=None, **options):
    """key: [Hk, Wk, heads], of three axes [D, H, W, heads], and value: [heads, dim_v] if they are not the query's."""

    def build(device):
        batch, *size, heads, dim = shape
        random = functools.partial(torch.randn, dtype=torch.float64, device=device)
        if key is None:
            qkv = random(batch, *size, 3, heads, dim)
            tensors = [qkv] if packed else list(qkv.unbind(-3))
        else:
            tensors = [random(*shape), random(batch, *key, dim), random(batch, *key[:-1], *value)]
        kernel = (kernel_size,) * len(size) if isinstance(kernel_size, int) else kernel_size
        rpb = random(heads, *(2 * k - 1 for k in kernel)) if bias else None
        return (*tensors, kernel_size), options | {"rpb": rpb, "return_lse": True}

    volume = functional.neighborhood_attention_3d if len(shape) == 6 else None
    return Problem(name, build, functional.neighborhood_attention_2d_packed if packed else volume)
