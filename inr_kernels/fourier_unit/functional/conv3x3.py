"""The public function of the 3 x 3 convolution in a fast Fourier convolution's local half."""

import torch

from inr_kernels._core import backends, dispatch
from inr_kernels._core.checks import apply_autocast, without_autocast

from .. import op, reference
from ..arguments import ConvolutionArguments


@op.CONV3X3.public()
def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    other: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    relu: bool = False,
    padding: str = "reflect",
    backend: str | None = None,
) -> torch.Tensor:
    """Convolves one input, or two concatenated along the channels, with 3 x 3 kernels; fuses bias, addition and ReLU.

        out[b, o, y, x] = sum_cij weight[o, c, i, j] [x; other][b, c, y + i - 1, x + j - 1] + bias[o] + add[b, o, y, x]

    or the ReLU of it. In float32 and float64 on a CPU it is Winograd's F(4 x 2, 3 x 3), with 24 multiplications where
    the sum has 72, or, for fewer than 16 channels and for "reflect transposed", F(2 x 2, 3 x 3), with 16 for 36. The
    errors in float32, some 3e-7 in relative norm, are at most twice those of torch's direct sum for dense kernels, but
    up to 3 times with 16 channels or fewer on small maps, and up to 4.5 times for kernels with a single tap or a single
    channel: those sums hardly round. A non-finite value spreads to outputs up to four pixels away, not only to its
    neighbours. Half precision is computed so, in float32, on CPUs where torch has only slow convolutions for it.
    Elsewhere it is torch's convolution.

    Args:
        x: [B, C, H, W], any floating-point dtype.
        weight: [O, C + D, 3, 3] in x's dtype, like all tensors (under autocast: any).
        bias: [O] or None.
        other: [B, D, H, W] or None. In float32 and float64, if x and other are slices of one tensor's
            channels, nothing is copied.
        add: [B, O, H, W] or None.
        relu: whether to apply a ReLU at the end.
        padding: "zeros", or, for sides of at least 2, "reflect" or "reflect transposed": the padding of the gradient of
            a convolution with "reflect". It pads two zeros on every side, and adds the border of the result, one pixel
            wide, to the pixels that "reflect" copies to that border.
        backend: "cpu": Winograd's algorithm in C++; "reference" and "triton": torch's convolution (there is no Triton
            kernel); None: the first of the op's table that can run.

    Returns:
        [B, O, H, W] in x's dtype (autocast's, under autocast).

    Gradients of every order reach all tensors. On a CPU the gradients of x and, with at least 32 channels and outputs
    and 2048 positions, of the weight are computed by Winograd's algorithm, too.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message gives the reason.

    Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 4, 5, 7)
        >>> conv3x3(x[:, :3], torch.randn(2, 4, 3, 3), other=x[:, 3:], relu=True).shape
        torch.Size([1, 2, 5, 7])
    """
    ConvolutionArguments(x, weight, bias, other, add, relu, padding).check_types()
    given = [t for t in (x, weight, bias, other, add) if t is not None]
    requested = dispatch.reference_if_transformed(dispatch.requested_backend(backend), *given)
    x, weight, bias, other, add = apply_autocast(x, weight, bias, other, add)
    arguments = ConvolutionArguments(x, weight, bias, other, add, bool(relu), padding)
    with without_autocast(x):  # already applied
        if requested in ("reference", "triton") or not (requested or backends.is_for_native(arguments.x)):
            arguments.check()  # the op checks its arguments itself
            return reference.conv3x3(*arguments)
        return op.conv3x3(*arguments, requested)
