"""How torch knows fourier_unit: schemas, fakes, autograd, and the choice of the backend. conv3x3 has a file of its own.

A unit is a transform, a product on the spectrum, statistics, a ReLU and a transform back. A backend brings the two
transforms and the product (`spectral_pipeline.Backend`); the reference does all at once.

x [B, C, H, W], weight [2 O, 2 C / groups], scale, shift [2 O]  ->  y [B, O, H, W], mean, variance [2 O] or empty
"""

import functools

import torch

from inr_kernels._core import backends, dispatch, native
from inr_kernels._core.registration import LIBRARY, define, forbid_second_derivative

from .. import reference
from . import dft_matmul, spectral_pipeline
from .conv3x3 import conv3x3, is_for_native, why_not_winograd

__all__ = ["conv3x3", "fourier_unit", "is_for_native", "why_not_cpu", "why_not_triton", "why_not_winograd"]

_FORM = "bool training, float eps, SymInt groups, str norm, str backend"


def _triton_kernels():
    from .. import triton_kernels

    return triton_kernels


why_not_cpu = backends.why_not_cpu
why_not_triton = functools.partial(backends.why_not_triton, _triton_kernels)


def _fft(x, norm):
    return torch.fft.rfftn(x, dim=(-2, -1), norm=norm)


def _native_product(z, weight, shift, relu, groups):
    z, weight = z.contiguous(), weight.contiguous()
    out = z.new_empty(len(z), len(weight) // 2, *z.shape[2:])
    native.load()[0].spectrum_product(
        type=backends.TYPES[weight.dtype],
        size=(len(z), groups, z.shape[1] // groups, out.shape[1] // groups, z.shape[2] * z.shape[3]),
        x=z.data_ptr(),
        weight=weight.data_ptr(),
        shift=backends.address(shift),
        relu=relu,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def _by_cpu():
    return spectral_pipeline.Backend(_fft, _native_product, reference.inverse)


def _by_triton():
    product = _triton_kernels().product
    transform, inverse = (functools.partial(f, product) for f in (dft_matmul.transform, dft_matmul.inverse))
    return spectral_pipeline.Backend(transform, product, inverse)


_STEPS = {"cpu": _by_cpu, "triton": _by_triton}


def _reference_backward(grad, x, weight, scale, shift, *form):
    # Below autograd, where ops run, only torch.func still differentiates.
    leaves = x, weight, scale, shift
    return torch.func.vjp(lambda *leaves: reference.fourier_unit(*leaves, *form)[0], *leaves)[1](grad)


def _choose(x, backend):
    return dispatch.OPS["fourier_unit"].choose(dispatch.wished(backend), backends.Facts(x.device, x.dtype))


def _check(x, weight, scale, shift, training, eps, groups, norm):
    """What the kernels rely on for their memory's sake; the functional's errors are the ones that explain."""
    if x.dim() != 4 or min(x.shape[1:]) < 1 or groups < 1 or norm not in spectral_pipeline.ADJOINT:
        raise ValueError(f"options out of range: x {list(x.shape)}, {groups} groups, norm {norm!r}")
    rows = len(weight)
    if rows < 1 or x.shape[1] % groups or rows % (2 * groups) or list(weight.shape[1:]) != [2 * x.shape[1] // groups]:
        raise ValueError(f"expected a weight [2 O, 2 C / groups] for x {list(x.shape)}; got {list(weight.shape)}")
    if any(list(t.shape) != [rows] for t in (scale, shift)):
        raise ValueError(f"expected scale and shift [{rows}]; got {list(scale.shape)} and {list(shift.shape)}")
    dtype = reference.compute_dtype(x.dtype)
    if any((t.dtype, t.device) != (dtype, x.device) for t in (weight, scale, shift)):
        raise ValueError(f"expected parameters in {dtype} on {x.device} for x in {x.dtype}")


def _forward(*args):
    *problem, backend = args
    _check(*problem)
    name = _choose(problem[0], backend)
    if name == "reference":
        return reference.fourier_unit(*problem)
    return spectral_pipeline.forward(_STEPS[name](), *problem)


def _forward_fake(x, weight, scale, shift, training, *_):
    statistics = (weight.new_empty(len(weight) if training else 0) for _ in range(2))
    return x.new_empty(len(x), len(weight) // 2, *x.shape[2:]), *statistics


def _backward(grad, x, weight, scale, shift, mean, var, *rest):
    *form, backend, needs_x, needs_weight, needs_affine = rest
    _check(x, weight, scale, shift, *form)
    if grad.shape != (len(x), len(weight) // 2, *x.shape[2:]) or grad.dtype != x.dtype:
        raise ValueError(f"expected a gradient of the output's shape and dtype; got {list(grad.shape)}, {grad.dtype}")
    if any(list(t.shape) != ([len(weight)] if form[0] else [0]) for t in (mean, var)):
        raise ValueError(f"expected the forward's statistics; got {list(mean.shape)} and {list(var.shape)}")
    name, needs = _choose(x, backend), (needs_x, needs_weight, needs_affine, needs_affine)
    if name == "reference":
        grads = _reference_backward(grad, x, weight, scale, shift, *form)
    else:
        grads = spectral_pipeline.backward(_STEPS[name](), grad, x, weight, scale, shift, mean, var, *form, needs)
    # A schema has no optional results.
    return tuple(g.contiguous() if needed else weight.new_empty(0) for g, needed in zip(grads, needs, strict=True))


def _backward_fake(grad, x, weight, scale, shift, mean, var, *rest):
    *_, needs_x, needs_weight, needs_affine = rest
    leaves, needs = (x, weight, scale, shift), (needs_x, needs_weight, needs_affine, needs_affine)
    return tuple(
        t.new_empty(t.shape) if needed else weight.new_empty(0) for t, needed in zip(leaves, needs, strict=True)
    )


fourier_unit = define(
    f"fourier_unit(Tensor x, Tensor weight, Tensor scale, Tensor shift, {_FORM}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
fourier_unit_backward = define(
    "fourier_unit_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor mean, Tensor var,"
    f" {_FORM}, bool needs_x, bool needs_weight, bool needs_affine) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.training, ctx.eps, ctx.groups, ctx.norm, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd(ctx, grad, *_):
    needs = ctx.needs_input_grad[:4]
    form = ctx.training, ctx.eps, ctx.groups, ctx.norm, ctx.backend, needs[0], needs[1], needs[2] or needs[3]
    grads = fourier_unit_backward(grad, *ctx.saved_tensors, *form)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *[None] * 5


torch.library.register_autograd("inr_kernels::fourier_unit", _autograd, setup_context=_setup_context, lib=LIBRARY)
forbid_second_derivative("fourier_unit")
