"""How torch knows elementwise_filter: schemas, fakes, autograd, and the choice of the backend.

x [B, C, H, W], kernel [B, groups K², Ho, Wo] with any strides, log_window [kh, kw] or None
->  [len(dilation), B, C, Ho, Wo]
"""

import functools

import torch

from inr_kernels._core import backends, dispatch, native
from inr_kernels._core.registration import LIBRARY, define, forbid_second_derivative

from . import reference

_ARGUMENTS = (
    "Tensor x, Tensor kernel, int[] kernel_size, SymInt groups, int[] dilation, int stride, int upscale,"
    " str padding, str normalize, float alpha, float beta, float gamma, Tensor? log_window, str backend"
)


def _triton_kernels():
    from . import triton_kernels

    return triton_kernels


why_not_cpu = backends.why_not_cpu
why_not_triton = functools.partial(backends.why_not_triton, _triton_kernels)

_PADDINGS = {"zeros": 0, "replicate": 1, "reflect": 2, "valid": 3}
_NORMALIZATIONS = {"none": 0, "taps": 1, "all": 2}


class _Problem:
    """A native problem with the tensors that its addresses point into."""

    def __init__(
        self, x, kernel, kernel_size, groups, dilation, stride, upscale, padding, normalize, *coefficients, log_window
    ):
        x = x.contiguous()  # one plane; the kernel's planes are read where they are
        window = None if log_window is None else log_window.double().contiguous()
        self.held = x, kernel, window
        self.native = native.load()[0].ElementwiseFilter(
            type=backends.TYPES[x.dtype],
            size=tuple(x.shape),
            groups=groups,
            out_size=tuple(kernel.shape[2:]),
            kernel_size=tuple(kernel_size),
            dilations=list(dilation),
            stride=stride,
            upscale=upscale,
            padding=_PADDINGS[padding],
            normalize=_NORMALIZATIONS[normalize],
            coefficients=coefficients,
            x=x.data_ptr(),
            kernel=(kernel.data_ptr(), kernel.stride()),
            log_window=0 if window is None else window.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def forward(self, out):
        self.native.forward(out.data_ptr())

    def backward(self, grad, x, kernel):
        self.native.backward(grad_out=grad.data_ptr(), x=backends.address(x), kernel=backends.address(kernel))


def _cpu_forward(x, kernel, *form):
    out = x.new_empty(len(form[2]), *x.shape[:2], *kernel.shape[2:])
    if out.numel():
        _Problem(x, kernel, *form[:-1], log_window=form[-1]).forward(out)
    return out


def _cpu_backward(grad, x, kernel, *form, needs_x, needs_kernel):
    grad = grad.contiguous()
    d_x = native.empty_like(x) if needs_x else None
    d_kernel = native.empty_like(kernel) if needs_kernel else None
    if x.numel():
        _Problem(x, kernel, *form[:-1], log_window=form[-1]).backward(grad, d_x, d_kernel)
    return d_x, d_kernel


def _reference_backward(grad, x, kernel, *form, needs_x, needs_kernel):
    # Below autograd, where ops run, only torch.func still differentiates.
    _, backward = torch.func.vjp(lambda x, kernel: reference.elementwise_filter(x, kernel, *form), x, kernel)
    grads = backward(grad)
    return grads[0] if needs_x else None, grads[1] if needs_kernel else None


_RUNNERS = {
    "cpu": (_cpu_forward, _cpu_backward),
    "triton": backends.triton_runner(_triton_kernels),
    "reference": (reference.elementwise_filter, _reference_backward),
}


def _choose(x, backend):
    facts = backends.Facts(x.device, x.dtype)
    return _RUNNERS[dispatch.OPS["elementwise_filter"].choose(dispatch.wished(backend), facts)]


def _check(
    x, kernel, kernel_size, groups, dilation, stride, upscale, padding, normalize, alpha, beta, gamma, log_window
):
    """What the kernels rely on for their memory's sake; the functional's errors are the ones that explain."""
    known = padding in _PADDINGS and normalize in _NORMALIZATIONS and len(kernel_size) == 2
    if not known or min(stride, upscale, groups, *kernel_size, *dilation) < 1 or not all(n % 2 for n in kernel_size):
        raise ValueError(f"options out of range: {kernel_size}, {groups}, {dilation}, {stride}, {upscale}")
    reach = [n // 2 * max(dilation) for n in kernel_size]
    if padding == "valid":
        sides = [side - 2 * r for side, r in zip(x.shape[2:], reach, strict=True)]
        short = min(sides) < 1 or len(dilation) > 1
    else:
        sides = list(x.shape[2:])
        short = min(x.shape[1:]) < 1 or (
            padding == "reflect" and any(n <= r for n, r in zip(sides, reach, strict=True))
        )
    shape = [len(x), groups * kernel_size[0] * kernel_size[1], *(-(-side * upscale // stride) for side in sides)]
    if short or x.shape[1] % groups or list(kernel.shape) != shape:
        raise ValueError(f"expected a kernel of {shape} for x {list(x.shape)}; got {list(kernel.shape)}")
    if (kernel.dtype, kernel.device) != (x.dtype, x.device):
        raise ValueError(f"expected {x.dtype} on {x.device}; got {kernel.dtype} on {kernel.device}")
    if log_window is not None and (list(log_window.shape), log_window.device) != (list(kernel_size), x.device):
        raise ValueError(f"expected a window {list(kernel_size)} on {x.device}; got {list(log_window.shape)}")


def _forward(*args):
    *problem, backend = args
    _check(*problem)
    return _choose(problem[0], backend)[0](*problem)


def _forward_fake(x, kernel, kernel_size, groups, dilation, *_):
    return x.new_empty(len(dilation), *x.shape[:2], *kernel.shape[2:])


def _backward(grad, *args):
    *problem, backend, needs_x, needs_kernel = args
    _check(*problem)
    x, kernel, dilations = problem[0], problem[1], problem[4]
    if grad.shape != (len(dilations), *x.shape[:2], *kernel.shape[2:]) or grad.dtype != x.dtype:
        raise ValueError(f"expected a gradient of the output's shape and dtype; got {list(grad.shape)}, {grad.dtype}")
    grads = _choose(x, backend)[1](grad, *problem, needs_x=needs_x, needs_kernel=needs_kernel)
    # A schema has no optional results.
    return tuple(grad.new_empty(0) if g is None else g.contiguous() for g in grads)


def _backward_fake(grad, x, kernel, *rest):
    *_, needs_x, needs_kernel = rest
    return (
        x.new_empty(x.shape if needs_x else 0),
        x.new_empty(kernel.shape if needs_kernel else 0),
    )


elementwise_filter = define(f"elementwise_filter({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
elementwise_filter_backward = define(
    f"elementwise_filter_backward(Tensor grad, {_ARGUMENTS}, bool needs_x, bool needs_kernel) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, kernel, *ctx.form, log_window, ctx.backend = inputs
    ctx.save_for_backward(x, kernel, *([] if log_window is None else [log_window]))


def _autograd(ctx, grad):
    x, kernel, *window = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grads = elementwise_filter_backward(grad, x, kernel, *ctx.form, *(window or [None]), ctx.backend, *needs)
    wanted = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    return *wanted, *[None] * (len(ctx.form) + 2)


torch.library.register_autograd("inr_kernels::elementwise_filter", _autograd, setup_context=_setup_context, lib=LIBRARY)
forbid_second_derivative("elementwise_filter")
