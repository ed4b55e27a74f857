"""The 3 x 3 convolution of a fast Fourier convolution's local half: the contract, the checks, autocast."""

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.backends import Facts
from inr_kernels._core.checks import require, require_tensor, result_dtype, shape

from .. import op, reference

PADDINGS = ("reflect", "zeros")


def conv3x3(x, weight, bias=None, *, other=None, add=None, relu=False, padding="reflect", backend=None):
    """A 3 x 3 convolution of one input, or of two whose channels follow each other, with what comes after it.

        out[b, o, y, x] = sum_cij weight[o, c, i, j] [x; other][b, c, y + i - 1, x + j - 1] + bias[o] + add[b, o, y, x]

    or the ReLU of that. In float32 and float64 on a CPU it is Winograd's F(2 x 2, 3 x 3), with 16 multiplications
    where the sum has 36, and float32 errors of at most twice the direct sum's; a value that is not finite reaches the
    outputs two pixels away, not only its neighbours. Elsewhere it is torch's convolution.

    Args:
        x: [B, C, H, W], any floating-point dtype.
        weight: [O, C + D, 3, 3] in x's dtype, like all tensors (under autocast: any).
        bias: [O] or None.
        other: [B, D, H, W] or None. Halves of one tensor's channels are read where they are.
        add: [B, O, H, W] or None.
        relu: whether to end with max(., 0).
        padding: "reflect", which needs sides of at least 2, or "zeros".
        backend: "reference": torch's convolution; "cpu": Winograd's; "triton": torch's convolution, as there is no
            kernel of its own; None: the fastest.

    Returns:
        [B, O, H, W] in x's dtype (autocast's, under autocast).

    Gradients of every order reach all tensors.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the wished backend cannot run here, and why.

    Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 4, 5, 7)
        >>> conv3x3(x[:, :3], torch.randn(2, 4, 3, 3), other=x[:, 3:], relu=True).shape
        torch.Size([1, 2, 5, 7])
    """
    require(padding in PADDINGS, "padding", f"be one of {', '.join(PADDINGS)}", repr(padding))
    require_tensor(x, "x", dims=(4,))
    least = 2 if padding == "reflect" else 1
    require(x.shape[1] > 0, "x", "have at least one channel", shape(x))
    require(min(x.shape[2:]) >= least, "x", f"have sides of at least {least} with padding={padding!r}", shape(x))
    require_tensor(weight, "weight", dims=(4,), like=x)
    channels = x.shape[1]
    if other is not None:
        require_tensor(other, "other", dims=(4,), like=x)
        fits = (len(other), *other.shape[2:]) == (len(x), *x.shape[2:])
        require(fits, "other", "have x's batch and size", shape(other))
        channels += other.shape[1]
    require(list(weight.shape[1:]) == [channels, 3, 3], "weight", f"have shape [O, {channels}, 3, 3]", shape(weight))
    out = [len(x), len(weight), *x.shape[2:]]
    for value, name, expected in ((bias, "bias", out[1:2]), (add, "add", out)):
        if value is not None:
            require_tensor(value, name, dims=(len(expected),), like=x)
            require(list(value.shape) == expected, name, f"have shape {expected}", shape(value))

    tensors, dtype = (x, weight, bias, other, add), result_dtype(x)
    if dtype == x.dtype and not torch.is_autocast_enabled(x.device.type):
        for value, name in zip(tensors, ("x", "weight", "bias", "other", "add"), strict=True):
            require(value is None or value.dtype == dtype, name, f"have x's dtype {dtype}", getattr(value, "dtype", ""))
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are settled
        x, weight, bias, other, add = (None if t is None else t.to(dtype) for t in tensors)
        given = (t for t in (x, weight, bias, other, add) if t is not None)
        wish = dispatch.settle_wish(dispatch.wished(backend), *given)
        if wish in ("reference", "triton") or not (wish or op.is_for_native(x)):
            return reference.conv3x3(x, weight, bias, other, add, bool(relu), padding)
        return op.conv3x3(x, weight, bias, other, add, bool(relu), padding, wish)


def _facts(x=None, *args, **kwargs):
    """What `explain` needs to know of a call."""
    return Facts(torch.device("cpu"), torch.float32) if x is None else Facts(x.device, result_dtype(x))


dispatch.register(
    dispatch.Op(
        name="conv3x3",
        function=conv3x3,
        facts=_facts,
        # torch's convolution stands for Triton's, so that a wish for Triton may hold for a whole network.
        backends={"cpu": op.why_not_winograd, "reference": lambda facts: "", "triton": lambda facts: ""},
    )
)
