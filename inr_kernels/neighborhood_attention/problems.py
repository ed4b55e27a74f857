"""The calls on which `inr-kernels prove` tries the kernels of neighborhood_attention."""

from collections.abc import Iterator

import torch

from inr_kernels._core.proof.problems import Problem

from . import functional


def neighborhood_attention(large: bool) -> Iterator[Problem]:
    """IN²'s attention, and windows, strides and layouts around it."""
    size, heads = ((48, 48), 8) if large else ((20, 24), 2)
    for dim in (32, 64, 128, 160):
        yield _problem("IN²'s", (1, *size, heads, dim), 7, bias=True)
        yield _problem("packed, dilated", (1, 13, 19, 2, dim - 13), (3, 5), packed=True, dilation=(2, 3))
        yield _problem("causal, with stride", (2, 11, 23, 2, dim), (4, 6), stride=(2, 3), is_causal=(True, False))
        yield _problem("even window, causal columns", (1, 9, 20, 3, dim), 2, bias=True, is_causal=(False, True))
        yield _problem("one pixel", (2, 1, 1, 1, dim), 1, bias=True)
    yield _problem("narrow head", (2, 9, 20, 3, 5), 5, bias=True, scale=0.7)
    yield _problem("head of 16", (2, 9, 20, 3, 16), 3, dilation=3)


def _problem(name, shape, kernel_size, bias=False, packed=False, **options):
    def build(device):
        *batch_and_size, heads, dim = shape
        qkv = torch.randn(*batch_and_size, 3, heads, dim, dtype=torch.float64, device=device)
        kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        rpb = torch.randn(heads, 2 * kh - 1, 2 * kw - 1, dtype=torch.float64, device=device) if bias else None
        tensors = [qkv] if packed else list(qkv.unbind(3))
        return (*tensors, kernel_size), options | {"rpb": rpb, "return_lse": True}

    return Problem(name, build, functional.neighborhood_attention_2d_packed if packed else None)
