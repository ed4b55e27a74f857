"""The public functions of the Fourier unit: documentation, argument checks, autocast. conv2d and conv3x3 have
their own files."""

from collections.abc import Callable
from typing import Any

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import is_positive_int, require, require_tensor, result_dtype, shape, without_autocast

from .. import op, reference
from ..arguments import Arguments, Facts, check_norm, check_weight, check_x, compute_dtype
from .conv2d import conv2d
from .conv3x3 import conv3x3

__all__ = ["conv2d", "conv3x3", "fourier_unit", "through_spectrum"]


def _facts(x: torch.Tensor, *args: Any, **kwargs: Any) -> Facts:
    """What decides on the backend of a call, of which `explain` may be given x only."""
    return Facts(x.device, result_dtype(x), max(x.shape[2:]))


@op.OP.public(_facts)
def fourier_unit(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor,
    bn_bias: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    groups: int = 1,
    norm: str = "ortho",
    dft: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Applies a 1 x 1 convolution, batch norm and a ReLU to the Fourier transform of an image.

        z = rfft2(x)                                       complex, [B, C, H, W // 2 + 1]
        p = weight [re z_0; im z_0; re z_1; im z_1; ...]   a convolution 1 x 1 of 2 C channels to 2 O
        p = relu(batch_norm(p))
        y = irfft2([p_0 + i p_1; p_2 + i p_3; ...])

    The spectrum p is not Hermitian. irfft2 matches numpy.fft.irfft2 on every backend: the non-Hermitian part of the
    first column and, at an even width, of the last is ignored. Any H and W; the spectrum is at least float32, so half
    precision neither requires powers of two nor overflows.

    Args:
        x: [B, C, H, W], float32, float64, bfloat16 or float16.
        weight: [2 O, 2 C / groups] or [2 O, 2 C / groups, 1, 1], any floating-point dtype, like all parameters; they
            are cast to float32, or to float64 for a float64 x.
        bn_weight, bn_bias: [2 O], of the batch norm.
        running_mean, running_var: [2 O], its statistics. Without `training` the norm uses them; with it, they are
            None or get updated in place, as by torch.nn.functional.batch_norm.
        training: normalize with the statistics of this batch, over B, H and W // 2 + 1.
        momentum: share of this batch's statistics in the update.
        eps: added to the variance.
        groups: of the convolution.
        norm: of both transforms: "ortho", "backward" or "forward".
        dft: whether to compute by matrix products with cosines and sines, in plain PyTorch, without a Fourier transform
            or an op of this package in the graph, for the export to ONNX. O(H + W) per value instead of O(log H W).
            Only the reference supports it.
        backend: "reference", "cpu", "triton"; None: the first in the table that can run (see `inr_kernels.explain`).

    Returns:
        [B, O, H, W] in x's dtype (autocast's, under autocast).

    Gradients reach x, weight, bn_weight and bn_bias, through the batch's statistics too; only the inputs and the
    statistics are saved for them. Second derivatives need `backend="reference"`; forward-mode differentiation and
    torch.func use it.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: a shape, device or option that does not fit, or a single value per channel to normalize in training;
            the message names the argument.
        RuntimeError: the requested backend cannot run here; the message gives the reason.

    Source: Chi, Jiang and Mu, Fast Fourier Convolution, NeurIPS 2020; Suvorov et al., Resolution-robust Large Mask
    Inpainting with Fourier Convolutions (LaMa), WACV 2022.

    Example:
        >>> import torch
        >>> x, weight, ones, zeros = torch.randn(1, 4, 5, 7), torch.randn(8, 8), torch.ones(8), torch.zeros(8)
        >>> fourier_unit(x, weight, ones, zeros, running_mean=zeros, running_var=ones).shape
        torch.Size([1, 4, 5, 7])
    """
    check_x(x)
    check_norm(norm)
    require(is_positive_int(groups), "groups", f"divide x's {x.shape[1]} channels", groups)
    weight = check_weight(weight, x, groups)
    _check_vector(bn_weight, "bn_weight", weight)
    _check_vector(bn_bias, "bn_bias", weight)
    for value, name in ((running_mean, "running_mean"), (running_var, "running_var")):
        if value is not None:
            _check_vector(value, name, weight)
        else:
            require(training, name, "be a tensor unless training", None)
    count = len(x) * x.shape[2] * (x.shape[3] // 2 + 1)
    require(not training or count > 1, "x", "have more than one frequency in all to train batch norm on", shape(x))

    requested = dispatch.requested_backend(backend)
    requested = dispatch.reference_if_transformed(requested, x, weight, bn_weight, bn_bias)
    require(not dft or requested in ("", "reference"), "backend", "be None or 'reference' with dft", repr(requested))
    dtype = result_dtype(x)
    with without_autocast(x):  # applied here
        x = x.to(dtype)
        weight, scale, shift = (t.to(compute_dtype(x.dtype)) for t in (weight, bn_weight, bn_bias))
        if not training:
            assert running_mean is not None and running_var is not None  # checked above
            scale = scale * torch.rsqrt(running_var.to(scale.dtype) + eps)
            shift = shift - running_mean.to(scale.dtype) * scale
        arguments = Arguments(x, weight, scale, shift, bool(training), float(eps), groups, norm)
        if dft or requested == "reference":
            y, mean, var = reference.fourier_unit(*arguments, dft)
        else:
            y, mean, var = op.fourier_unit(*arguments, requested)
        if training:
            with torch.no_grad():
                for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                    if running is not None:
                        running.lerp_(new.detach().to(running.dtype), momentum)
    return y


def through_spectrum(x: torch.Tensor, mix: Callable[[torch.Tensor], torch.Tensor], norm: str = "ortho") -> torch.Tensor:
    """Applies `mix` to the Fourier transform of an image, in plain PyTorch: `fourier_unit` with another middle part.

    Args:
        x: [B, C, H, W].
        mix: called with the spectrum [B, 2 C, H, W // 2 + 1], real and imaginary parts interleaved, in float32 or
            float64; returns [B, 2 O, H, W // 2 + 1].
        norm: of both transforms.

    Returns:
        [B, O, H, W] in x's dtype (autocast's, under autocast).

    Example:
        >>> import torch
        >>> through_spectrum(torch.randn(1, 4, 5, 7), torch.relu).shape
        torch.Size([1, 4, 5, 7])
    """
    dtype = compute_dtype(x.dtype)
    z = mix(reference.fft_spectrum(x.to(dtype), norm)).to(dtype)
    return reference.fft_image(z, x.shape[2:], norm).to(result_dtype(x))


def _check_vector(value, name, weight):
    """Raises unless the value is a vector with one element per row of weight."""
    require_tensor(value, name, dims=(1,), like=weight)
    require(len(value) == len(weight), name, f"have weight's {len(weight)} rows", shape(value))
