"""Problems for the tests of unmask_attention, and the rule for how close is close."""

import math

import torch

from inr_kernels import unmask_attention

# Tests that reach every loop and border of the C++: test_sanitizers.py runs them.
SANITIZED = ["test_shapes", "gradcheck", "foreign_memory", "large_scores", "nan_and", "empty", "strides"]

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
    """A problem in float64, to be cast to what is tested."""

    def __init__(self, shape=(2, 8, 5, 7), hole="some", mask_keys=False, scale=None, size=1.0):
        self.feat, self.grad = (size * torch.randn(shape, dtype=torch.float64) for _ in range(2))
        self.mask = mask_of(hole, shape[0], *shape[2:])
        self.options = {"mask_keys": mask_keys, "scale": scale}

    def attend(self, dtype, backend, rounded=torch.float64):
        """The output and the gradient of (output * grad).sum(); `rounded`: what the inputs went through before."""
        feat, grad = (t.to(rounded).to(dtype, copy=True) for t in (self.feat, self.grad))
        out = unmask_attention(feat.requires_grad_(), self.mask, **self.options, backend=backend)
        return out.detach(), *torch.autograd.grad(out, feat, grad)


def assert_as_accurate(case, dtype, backend):
    """The error against float64, in relative norm, is at most twice eager's in the same dtype, or a few roundings."""
    truth, eager = case.attend(torch.float64, "reference", rounded=dtype), case.attend(dtype, "reference")
    few = 1e-14 if dtype == torch.float64 else 1e-6
    few += torch.finfo(dtype).eps if dtype.itemsize == 2 else 0  # the result's own rounding
    for i, (result, other, exact) in enumerate(zip(case.attend(dtype, backend), eager, truth, strict=True)):
        assert result.shape == exact.shape
        assert result.dtype == other.dtype == dtype
        scale = max(exact.norm().item(), 0.1 * math.sqrt(exact.numel()))
        error, allowed = ((t.double() - exact).norm().item() / scale for t in (result, other))
        assert error <= 2 * allowed + few, f"tensor {i}: error {error:.1e}, eager's {allowed:.1e}"
