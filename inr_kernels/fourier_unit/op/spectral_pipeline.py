"""The computation of a Fourier unit, forward and backward, from a backend's transforms and its product.

A half spectrum does not store the conjugate mirrors of its columns; only the first and, at an even width, the last
column have none. So all other columns count twice in the adjoint of the inverse transform, and half in that of the
transform. The statistics count every stored column once, as LaMa's do. A spectrum is complex [B, C, H, W']; its real
view is [B, C, H, 2 W'], without a copy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from inr_kernels._core import signs
from inr_kernels._core.dispatch import Backend
from inr_kernels._core.registration import only_needed

# The norm whose inverse transform is a transform's adjoint.
ADJOINT = {"ortho": "ortho", "backward": "forward", "forward": "backward"}


class Steps(NamedTuple):
    """transform(x, norm) -> z, product(z, weight, shift, relu, groups) -> z, inverse(z, size, norm) -> x.

    weight [2 O, 2 C / groups] multiplies the real and imaginary parts; shift [2 O] or None is added; then the ReLU.
    """

    transform: Callable[..., torch.Tensor]
    product: Callable[..., torch.Tensor]
    inverse: Callable[..., torch.Tensor]


def backend(why_not: Callable[[Any], str], steps: Callable[[], Steps]) -> Backend:
    """The backend that computes a unit from the steps that `steps()` returns."""

    def run_forward(a):
        return _forward(steps(), *a)

    def run_backward(grad, mean, var, a, *, needs):
        return _backward(steps(), grad, mean, var, *a, needs)

    return Backend(why_not, run_forward, run_backward)


def _forward(steps, x, weight, scale, shift, training, eps, groups, norm):
    """The op's outputs."""
    mean = var = weight.new_empty(0)
    if not x.numel():
        return x.new_empty(len(x), len(weight) // 2, *x.shape[2:]), mean, weight.new_empty(0)
    z = steps.transform(x.to(weight.dtype, memory_format=torch.contiguous_format), norm)
    if training:
        z = steps.product(z, weight, None, False, groups)
        var, mean = (t.flatten() for t in torch.var_mean(torch.view_as_real(z), (0, 2, 3), correction=0))
        factor, summand = _affine(scale, shift, mean, var, eps, training)
        p = _real(z)
        p.mul_(_rows(factor, p)).add_(_rows(summand, p)).relu_()
    else:
        z = steps.product(z, weight * scale[:, None], shift, True, groups)
    return steps.inverse(z, x.shape[2:], norm).to(x.dtype), mean, var if training else weight.new_empty(0)


def forward_positive(
    steps: Steps, x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, groups: int, norm: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A unit with a folded norm, x [B, C, H, W] -> y [B, O, H, W], and the packed signs of its ReLU's output.

    The latter, of [B, O, H, 2 W'] values, are all that `input_gradient` needs.
    """
    z = steps.product(steps.transform(x.to(weight.dtype), norm), weight, shift, True, groups)
    bits = signs.pack(_real(z))
    return steps.inverse(z, x.shape[2:], norm).to(x.dtype), bits


def input_gradient(
    steps: Steps, grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, groups: int, norm: str
) -> torch.Tensor:
    """The gradient of x [B, C, H, W] from that of y and the packed signs of `forward_positive`."""
    g = signs.select(_of_spectrum(steps, grad, weight.dtype, norm), bits)
    return _of_input(steps, g, weight, groups, norm, grad.shape[2:]).to(grad.dtype)


def _of_spectrum(steps, grad, dtype, norm):
    """The gradient of a spectrum's real view from that of its inverse transform."""
    return _real(_scale_pairs(steps.transform(grad.to(dtype), ADJOINT[norm]), grad.shape[3], 2))


def _of_input(steps, g, weight, groups, norm, size):
    """The gradient of x from that of the product, as a real view; weight [2 O, 2 C / groups]."""
    transposed = weight.unflatten(0, (groups, -1)).mT.flatten(0, 1)
    d_z = steps.product(torch.view_as_complex(g.unflatten(3, (-1, 2))), transposed, None, False, groups)
    return steps.inverse(_scale_pairs(d_z, size[1], 0.5), size, ADJOINT[norm])


def _backward(steps, grad, mean, var, x, weight, scale, shift, training, eps, groups, norm, needs):
    """Gradients of x, weight, scale and shift; None for those that are not needed."""
    needs_x, needs_weight, needs_affine, _ = needs
    if not x.numel():
        return only_needed((x.new_empty(x.shape), *map(torch.zeros_like, (weight, scale, shift))), needs)
    z = steps.transform(x.to(weight.dtype), norm)
    g = _of_spectrum(steps, grad, weight.dtype, norm)
    factor, summand = _affine(scale, shift, mean, var, eps, training)
    d_scale = d_shift = None
    if training or needs_affine:
        p = _real(steps.product(z, weight, None, False, groups))
        g = torch.ops.aten.threshold_backward(g, torch.addcmul(_rows(summand, p), p, _rows(factor, p)), 0)
        if training:
            p.sub_(_rows(mean, p)).mul_(_rows(torch.rsqrt(var + eps), p))
        d_shift, d_scale = _sums(g), _sums(g * p)
        if training:
            count = p[:, 0].numel() // 2
            g = g - torch.addcmul(_rows(d_shift / count, p), p, _rows(d_scale / count, p))
    else:
        g = torch.ops.aten.threshold_backward(
            g, _real(steps.product(z, weight * factor[:, None], summand, True, groups)), 0
        )
    d_weight = d_x = None
    if needs_weight:
        d_weight = _outer(torch.view_as_complex(g.unflatten(3, (-1, 2))), z, groups) * factor[:, None]
    if needs_x:
        d_x = _of_input(steps, g, weight * factor[:, None], groups, norm, x.shape[2:]).to(x.dtype)
    return only_needed((d_x, d_weight, d_scale, d_shift), needs)


def _affine(scale, shift, mean, var, eps, training):
    """(factor, summand) that normalize, scale and shift at once."""
    if not training:
        return scale, shift
    factor = scale * torch.rsqrt(var + eps)
    return factor, shift - mean * factor


def _real(z):
    return torch.view_as_real(z).flatten(3)


def _rows(values, p):
    """[2 O] as [O, 1, 2 W'], which multiplies a real view row by row."""
    return values.view(-1, 1, 1, 2).expand(-1, 1, p.shape[3] // 2, 2).flatten(2)


def _sums(p):
    """The sums of a real view over images and frequencies, [2 O]."""
    return p.unflatten(3, (-1, 2)).sum((0, 2, 3)).flatten()


def _scale_pairs(z, width, factor):
    """Multiplies, in place, the columns of z whose conjugate mirror is not stored."""
    z[..., 1 : (width + 1) // 2] *= factor
    return z


def _outer(g, z, groups):
    """[2 O, 2 C / groups]: sums over images and frequencies of g's parts times z's."""
    g, z = (torch.view_as_real(t).permute(1, 4, 0, 2, 3).reshape(groups, 2 * t.shape[1] // groups, -1) for t in (g, z))
    return (g @ z.mT).flatten(0, 1)
