"""Random problems for the tests of unmask_attention, their tolerances, and the Triton launches to compile."""

import itertools
import math

import torch

from inr_kernels import unmask_attention
from inr_kernels.unmask_attention import triton_kernels

# Tests that reach every loop and border of the C++: test_sanitizers.py runs them.
SANITIZED = ["test_shapes", "gradcheck", "checks_bounds", "large_scores", "nan_and", "empty", "strides"]

HOLES = ["some", "none", "all", "one left", "soft", "mixed", "by image"]

SHAPES = {
    "one pixel": (1, 3, 1, 1),
    "one row": (1, 4, 1, 67),
    "one column": (2, 1, 50, 1),
    "one channel": (1, 1, 9, 9),
    "64 channels": (1, 64, 20, 31),
    "65 channels": (1, 65, 11, 13),
    "300 channels": (1, 300, 9, 9),
    "many blocks": (1, 7, 40, 41),
    "whole blocks": (1, 64, 32, 32),
    "batch": (5, 6, 3, 4),
}


def mask_of(kind, batch, height, width):
    """[B, 1, H, W], 1 = hole."""
    mask = torch.rand(batch, 1, height, width)
    if kind == "soft":
        return mask
    if kind == "mixed":  # holes, known pixels and some between
        return (3 * mask - 1).clamp(0, 1)
    share = {"some": 0.4, "none": 0.0, "all": 1.0, "one left": 1.0, "by image": 0.5}[kind]
    mask = (mask < share).float()
    if kind == "one left":
        mask[..., -1, -1] = 0
    if kind == "by image":  # the first all hole, the second none
        mask[0], mask[1:2] = 1, 0
    return mask


class Case:
    """A problem in float64, cast to the dtype under test."""

    def __init__(self, shape=(2, 8, 5, 7), hole="some", mask_keys=False, scale=None, size=1.0):
        self.feat, self.grad = (size * torch.randn(shape, dtype=torch.float64) for _ in range(2))
        self.mask = mask_of(hole, shape[0], *shape[2:])
        self.options = {"mask_keys": mask_keys, "scale": scale}

    def max_score(self):
        """A bound of the scores' magnitudes."""
        scale = self.options["scale"]
        scale = self.feat.shape[1] ** -0.5 if scale is None else abs(scale)
        return scale * self.feat.square().sum(1).max().item()

    def run(self, dtype, backend, rounded=torch.float64):
        """The output and the gradient of (output * grad).sum(); rounded: the dtype to round the inputs to first."""
        feat, grad = (t.to(rounded).to(dtype, copy=True) for t in (self.feat, self.grad))
        out = unmask_attention(feat.requires_grad_(), self.mask, **self.options, backend=backend)
        return out.detach(), *torch.autograd.grad(out, feat, grad)


def assert_kernel_as_accurate(case, dtype, backend):
    """Asserts that the error against float64, in relative norm, is at most twice eager's, or a few roundings.

    In float64, eager is the truth: its own error does not show. e^score has a relative error of |score| roundings,
    there and in the kernel; against numpy's longdouble both have nearly the same error.
    """
    truth, eager = case.run(torch.float64, "reference", rounded=dtype), case.run(dtype, "reference")
    few = 8 * torch.finfo(torch.float32).eps
    if dtype == torch.float64:
        few = (8 + 2 * case.max_score()) * torch.finfo(dtype).eps
    few += torch.finfo(dtype).eps if dtype.itemsize == 2 else 0  # the result's own rounding
    for i, (result, other, exact) in enumerate(zip(case.run(dtype, backend), eager, truth, strict=True)):
        assert result.shape == exact.shape
        assert result.dtype == other.dtype == dtype
        scale = max(exact.norm().item(), 0.1 * math.sqrt(exact.numel()))
        error, allowed = ((t.double() - exact).norm().item() / scale for t in (result, other))
        assert error <= 2 * allowed + few, f"tensor {i}: error {error:.1e}, eager's {allowed:.1e}"


def gpu_problems(dtype):
    """(name, options of Case) for the tests on a GPU."""
    yield "DEAR's", {"shape": (2, 64, 32, 32)}
    for mask_keys, hole in itertools.product((False, True), HOLES):
        yield f"{hole}{', keys' if mask_keys else ''}", {"shape": (2, 33, 13, 17), "hole": hole, "mask_keys": mask_keys}
    for name, (batch, channels, *sides) in SHAPES.items():
        yield name, {"shape": (batch, min(channels, 64), *sides), "hole": "mixed"}


def compilations(dtype, arch):
    """Launches the attention, forward and backward; yields the channels, and whether keys are masked, before."""
    for channels, mask_keys in ((64, False), (64, True), (128, False), (256, False)):
        if channels > triton_kernels.max_channels(dtype):
            continue
        yield f"{channels}{' keys' if mask_keys else ''}"
        arguments = {"feat": torch.empty(2, channels, 4096, dtype=dtype), "weight": torch.ones(2, 4096)}
        arguments |= {"scale": 0.125, "mask_keys": mask_keys}
        out, softmax = triton_kernels.forward(**arguments)
        triton_kernels.backward(grad=out, out=out, softmax=softmax, **arguments)
