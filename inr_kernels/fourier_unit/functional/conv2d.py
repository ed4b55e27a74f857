"""The public function of convolutions other than 3 x 3 of stride 1: with a stride, transposed, of other kernels."""

import torch

from inr_kernels._core import backends, dispatch
from inr_kernels._core.checks import apply_autocast, require, without_autocast

from .. import op, reference
from ..arguments import Conv2dArguments


@op.CONV2D.public()
def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    relu: bool = False,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | tuple[int, int] = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Convolves, or convolves transposed, by a kernel of any size; fuses padding, scale, bias, addition and ReLU.

        out = scale[o] conv(pad(x))[b, o, y, x] + bias[o] + add[b, o, y, x]

    or the ReLU of it, where conv is torch's conv2d or conv_transpose2d with these options. A batch norm in evaluation
    is a scale and a bias. In float32 and float64 on a CPU the sum is computed directly from [B, C, H, W], without a
    copy of x that is padded, in another layout, or a matrix of patches; kernels of 3 x 3 with stride 2 and padding 1
    are computed by Winograd's algorithm where this takes fewer products. There float32 errors are at most twice the
    sum's, and a non-finite value spreads over its tile of 3 x 3 outputs. Half precision is computed so, in float32, on
    CPUs where torch has only slow convolutions for it. Elsewhere it is torch's convolution. For kernels of 3 x 3 with
    stride 1, `conv3x3` is faster.

    Args:
        x: [B, C, H, W], any floating-point dtype.
        weight: [O, C, kh, kw], or [C, O, kh, kw] if transposed, in x's dtype, like all tensors (under autocast: any).
        bias: [O] or None.
        scale: [O] or None.
        add: [B, O, H', W'] or None.
        relu: whether to apply a ReLU at the end.
        stride, padding: an integer, or two: vertical and horizontal.
        padding_mode: "zeros", or, unless transposed, "reflect", for sides longer than the padding.
        transposed: whether the convolution is transposed.
        output_padding: rows and columns that a transposed convolution adds at the end, less than the stride.
        backend: "cpu": the kernel in C++; "reference" and "triton": torch's convolution (there is no Triton kernel);
            None: the first of the op's table that can run.

    Returns:
        [B, O, H', W'] in x's dtype (autocast's, under autocast), of the size of torch's convolution.

    Gradients of every order reach all tensors.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, dtype, device or option that does not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message gives the reason.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 4, 6, 8)
        >>> conv2d(x, torch.randn(3, 4, 7, 7), padding=3, padding_mode="reflect").shape
        torch.Size([1, 3, 6, 8])
        >>> conv2d(x, torch.randn(4, 2, 3, 3), stride=2, padding=1, transposed=True, output_padding=1).shape
        torch.Size([1, 2, 12, 16])
    """
    pairs = [_pair(value, name) for value, name in ((stride, "stride"), (padding, "padding"))]
    options = (*pairs, padding_mode, bool(transposed), _pair(output_padding, "output_padding"))
    Conv2dArguments(x, weight, scale, bias, add, relu, *options).check_types()
    given = [t for t in (x, weight, scale, bias, add) if t is not None]
    requested = dispatch.reference_if_transformed(dispatch.requested_backend(backend), *given)
    x, weight, scale, bias, add = apply_autocast(x, weight, scale, bias, add)
    arguments = Conv2dArguments(x, weight, scale, bias, add, bool(relu), *options)
    with without_autocast(x):  # already applied
        if requested in ("reference", "triton") or not (requested or backends.is_for_native(arguments.x)):
            arguments.check()  # the op checks its arguments itself
            return reference.conv2d(*arguments)
        return op.conv2d(*arguments, requested)


def _pair(value, name):
    """An integer, or two, as two."""
    integer = int, torch.SymInt
    pair = (value, value) if isinstance(value, integer) else value
    fits = isinstance(pair, (tuple, list)) and len(pair) == 2
    fits = fits and all(isinstance(n, integer) and not isinstance(n, bool) for n in pair)
    require(fits, name, "be an integer, or two", repr(value))
    return tuple(pair)
