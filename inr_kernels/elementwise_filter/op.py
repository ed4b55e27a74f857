"""The op elementwise_filter in torch: schemas, fakes, autograd, and the table of backends.

x [B, C, H, W], kernel [B, groups K², Ho, Wo] with any strides, log_window [kh, kw] or None
->  [len(dilation), B, C, Ho, Wo]
"""

import math
from collections.abc import Sequence

import torch

from inr_kernels._core import backends, native
from inr_kernels._core.dispatch import Backend, Op, always
from inr_kernels._core.registration import (
    define,
    fake_gradients,
    forbid_second_derivative,
    only_needed,
    register_autograd,
    schema_results,
)

from . import reference
from .arguments import NORMALIZATIONS, Arguments, Facts, reach

_ARGUMENTS = (
    "Tensor x, Tensor kernel, int[] kernel_size, SymInt groups, int[] dilation, int stride, int upscale,"
    " str padding, str normalize, float alpha, float beta, float gamma, Tensor? log_window, str backend"
)

# Limits of the CUDA backward: max_taps and max_dilations in csrc/cuda/elementwise_filter_backward.cu, and pixels from
# the centre to a tap, beyond which the halo would be most of a block's pixels.
_MAX_TAPS, _MAX_DILATIONS, _MAX_REACH = 25, 8, 4


def _native(a):
    x = a.x.contiguous()  # the kernel's planes are read by strides
    window = None if a.log_window is None else a.log_window.double().contiguous()
    problem = native.load()[0].ElementwiseFilter(
        type=backends.TYPES[x.dtype],
        size=tuple(x.shape),
        groups=a.groups,
        out_size=tuple(a.kernel.shape[2:]),
        kernel_size=tuple(a.kernel_size),
        dilations=list(a.dilation),
        stride=a.stride,
        upscale=a.upscale,
        padding=backends.PADDINGS[a.padding],
        normalize=NORMALIZATIONS[a.normalize],
        coefficients=(a.alpha, a.beta, a.gamma),
        x=x.data_ptr(),
        kernel=(a.kernel.data_ptr(), a.kernel.stride()),
        log_window=backends.address(window),
        threads=torch.get_num_threads(),
    )
    return backends.NativeProblem(problem, x, a.kernel, window)


def _output(a):
    """The uninitialized output."""
    return a.x.new_empty(a.out_shape())


def _cpu_forward(a):
    out = _output(a)
    if out.numel():
        _native(a).forward(out.data_ptr())
    return out


def _cpu_backward(grad, a, *, needs_x, needs_kernel):
    grad = grad.contiguous()
    d_x = native.empty_like(a.x) if needs_x else None
    d_kernel = native.empty_like(a.kernel) if needs_kernel else None
    if a.x.numel():
        _native(a).backward(grad_out=grad.data_ptr(), x=backends.address(d_x), kernel=backends.address(d_kernel))
    return d_x, d_kernel


def why_not_cuda(facts: Facts) -> str:
    """Why the CUDA C++ kernels cannot run: they take three dtypes, and each group has its own softmax."""
    reason = backends.why_not_cuda(facts, (torch.float32, torch.bfloat16, torch.float16))
    return reason or ("it takes normalize 'none' and 'taps'; got 'all'" if facts.normalize == "all" else "")


def has_cuda_backward(kernel_size: Sequence[int], dilations: Sequence[int], stride: int, upscale: int) -> bool:
    """Whether a CUDA C++ kernel computes the gradients of a call."""
    is_small = math.prod(kernel_size) <= _MAX_TAPS and len(dilations) <= _MAX_DILATIONS
    return is_small and max(reach(kernel_size, max(dilations))) <= _MAX_REACH and stride == upscale == 1


def _launch(name, a, **tensors):
    """Launches a CUDA kernel, which takes the window in float32."""
    window = None if a.log_window is None else a.log_window.float().contiguous()
    addresses = {key: backends.address(tensor) for key, tensor in tensors.items()}
    _native(a._replace(log_window=None)).launch(name, a.x.device, log_window=backends.address(window), **addresses)


def _cuda_forward(a):
    out = _output(a)
    if out.numel():
        _launch("forward_cuda", a, out=out)
    return out


def _cuda_backward(grad, a, *, needs_x, needs_kernel):
    """The gradients of x and of the kernel, or None.

    Calls that the CUDA kernel does not take (more than 25 taps or 8 dilations, taps more than 4 pixels from the centre,
    a stride or upscaling) are computed by Triton.
    """
    if not has_cuda_backward(a.kernel_size, a.dilation, a.stride, a.upscale) or not grad.numel():
        return _TRITON.backward(grad, a, needs_x=needs_x, needs_kernel=needs_kernel)
    d_x = a.x.new_empty(a.x.shape) if needs_x else None
    d_kernel = a.kernel.new_empty(a.kernel.shape) if needs_kernel else None
    _launch("backward_cuda", a, grad_out=grad.contiguous(), x=d_x, kernel=d_kernel)
    return d_x, d_kernel


def _reference_forward(a):
    return reference.elementwise_filter(*a)


def _reference_backward(grad, a, *, needs_x, needs_kernel):
    def run(x, kernel):
        return _reference_forward(a._replace(x=x, kernel=kernel))

    return only_needed(backends.vjp(run, grad, a.x, a.kernel), (needs_x, needs_kernel))


_TRITON = backends.triton_backend(f"{__package__}.triton_kernels")


def cuda_backend() -> Backend:
    """The CUDA C++ kernels; the backward of some calls is Triton's (`_cuda_backward`)."""
    return Backend(why_not_cuda, _cuda_forward, _cuda_backward)


OP = Op(
    "elementwise_filter",
    Arguments,
    {
        "cpu": Backend(backends.why_not_cpu, _cpu_forward, _cpu_backward),
        "reference": Backend(always, _reference_forward, _reference_backward),
        # After the reference, so opt-in where no verdict decides.
        "triton": _TRITON,
        "cuda": cuda_backend(),
    },
)


def _backward(grad, *args):
    *args, needs_x, needs_kernel = args
    a, backend = OP.select(*args, backward=True)
    a.check_gradient(grad)
    return schema_results(backend.backward(grad, a, needs_x=needs_x, needs_kernel=needs_kernel), like=grad)


def _backward_fake(grad, x, kernel, *rest):
    *_, needs_x, needs_kernel = rest
    return fake_gradients((x, kernel), (needs_x, needs_kernel), like=grad)


elementwise_filter = define(f"elementwise_filter({_ARGUMENTS}) -> Tensor", OP.forward, OP.fake(_output))
elementwise_filter_backward = define(
    f"elementwise_filter_backward(Tensor grad, {_ARGUMENTS}, bool needs_x, bool needs_kernel) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, kernel, *ctx.options, log_window, ctx.backend = inputs
    ctx.save_for_backward(x, kernel, *([] if log_window is None else [log_window]))


def _autograd(ctx, grad):
    x, kernel, *window = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grads = elementwise_filter_backward(grad, x, kernel, *ctx.options, *(window or [None]), ctx.backend, *needs)
    return *only_needed(grads, needs), *[None] * (len(ctx.options) + 2)


register_autograd("elementwise_filter", _setup_context, _autograd)
forbid_second_derivative("elementwise_filter")
