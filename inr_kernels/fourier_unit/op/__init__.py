"""The op fourier_unit in torch: schemas, fakes, autograd, and the table of backends.

The ops conv2d and conv3x3 have their own files.

A unit is a transform, a product on the spectrum, statistics, a ReLU and a transform back. A backend provides the two
transforms and the product (`spectral_pipeline.Steps`); the reference computes all at once.

x [B, C, H, W], weight [2 O, 2 C / groups], scale, shift [2 O]  ->  y [B, O, H, W], mean, variance [2 O] or empty
"""

import functools
import importlib

import torch

from inr_kernels._core import backends
from inr_kernels._core.dispatch import Backend, Op, always
from inr_kernels._core.registration import (
    define,
    fake_gradients,
    forbid_second_derivative,
    only_needed,
    register_autograd,
    schema_results,
)

from .. import reference
from ..arguments import Arguments, Facts
from . import dft_matmul, kept, spectral_pipeline
from .conv2d import CONV2D, NativeConv2d, conv2d
from .conv3x3 import CONV3X3, NativeConv3x3, conv3x3, input_gradient, weight_gradient
from .spectrum_product import NativeProduct, native_product

__all__ = [
    "CONV2D",
    "CONV3X3",
    "OP",
    "NativeConv2d",
    "NativeConv3x3",
    "NativeProduct",
    "conv2d",
    "conv3x3",
    "fourier_unit",
    "input_gradient",
    "kept",
    "native_steps",
    "steps",
    "weight_gradient",
]

_OPTIONS = "bool training, float eps, SymInt groups, str norm, str backend"
_TRITON = "inr_kernels.fourier_unit.triton_kernels"


def native_steps() -> spectral_pipeline.Steps:
    """The transforms and the product of the backend "cpu"."""
    return spectral_pipeline.Steps(reference.transform, native_product, reference.inverse)


def _triton_steps():
    product = importlib.import_module(_TRITON).product
    transform, inverse = (functools.partial(f, product) for f in (dft_matmul.transform, dft_matmul.inverse))
    return spectral_pipeline.Steps(transform, product, inverse)


def _reference_steps():
    return spectral_pipeline.Steps(reference.transform, reference.product, reference.inverse)


STEPS = {"cpu": native_steps, "reference": _reference_steps, "triton": _triton_steps}


def _reference_forward(a):
    return reference.fourier_unit(*a)


def _reference_backward(grad, mean, var, a, *, needs):
    def run(x, weight, scale, shift):
        return _reference_forward(a._replace(x=x, weight=weight, scale=scale, shift=shift))[0]

    return only_needed(backends.vjp(run, grad, a.x, a.weight, a.scale, a.shift), needs)


OP = Op(
    "fourier_unit",
    Arguments,
    {
        "cpu": spectral_pipeline.backend(backends.why_not_cpu, STEPS["cpu"]),
        "reference": Backend(always, _reference_forward, _reference_backward),
        # After the reference, so opt-in where no verdict decides.
        "triton": spectral_pipeline.backend(functools.partial(backends.why_not_triton, _TRITON), STEPS["triton"]),
    },
)


def steps(x: torch.Tensor, requested: str) -> spectral_pipeline.Steps:
    """The transforms and the product of the backend that runs a unit on x [B, C, H, W]; requested: its name or ""."""
    chosen = OP.choose(requested, Facts(x.device, x.dtype, max(x.shape[2:])))
    return next(STEPS[name]() for name, backend in OP.backends.items() if backend is chosen)


def _outputs(a):
    """Uninitialized y, mean and variance."""
    mean, var = (a.weight.new_empty(len(a.weight) if a.training else 0) for _ in range(2))
    return a.x.new_empty(a.out_shape()), mean, var


def _backward(grad, mean, var, *args):
    *args, needs_x, needs_weight, needs_affine = args
    a, backend = OP.select(*args, backward=True)
    a.check_saved(grad, mean, var)
    needs = needs_x, needs_weight, needs_affine, needs_affine
    return schema_results(backend.backward(grad, mean, var, a, needs=needs), like=a.weight)


def _backward_fake(grad, mean, var, x, weight, scale, shift, *rest):
    *_, needs_x, needs_weight, needs_affine = rest
    needs = needs_x, needs_weight, needs_affine, needs_affine
    return fake_gradients((x, weight, scale, shift), needs, like=weight)


fourier_unit = define(
    f"fourier_unit(Tensor x, Tensor weight, Tensor scale, Tensor shift, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    OP.forward,
    OP.fake(_outputs),
)
fourier_unit_backward = define(
    "fourier_unit_backward(Tensor grad, Tensor mean, Tensor var, Tensor x, Tensor weight, Tensor scale, Tensor shift,"
    f" {_OPTIONS}, bool needs_x, bool needs_weight, bool needs_affine) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, scale, shift, *ctx.options = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(mean, var, x, weight, scale, shift)


def _autograd(ctx, grad, *_):
    needs = needs_x, needs_weight, needs_scale, needs_shift = ctx.needs_input_grad[:4]
    flags = needs_x, needs_weight, needs_scale or needs_shift
    grads = fourier_unit_backward(grad, *ctx.saved_tensors, *ctx.options, *flags)
    return *only_needed(grads, needs), *[None] * len(ctx.options)


register_autograd("fourier_unit", _setup_context, _autograd)
forbid_second_derivative("fourier_unit")
