"""The op conv3x3 in torch, the convolution beside a Fourier unit: schema, fake, autograd, and the table of backends.

x [B, C, H, W], other [B, D, H, W] or None, weight [O, C + D, 3, 3], bias [O], add as the output  ->  [B, O, H, W]

In C++ (Winograd) for float32 and float64 on a CPU, and for half precision where torch is slow; elsewhere torch's
convolution. The backward consists of convolutions and of the op conv3x3_weight_gradient, whose backward consists of
convolutions: there are derivatives of every order.
"""

import torch
import torch.nn.functional as F

from inr_kernels._core import backends, native
from inr_kernels._core.checks import require_match, require_tensor
from inr_kernels._core.dispatch import Backend, Op, always
from inr_kernels._core.registration import define, only_needed, register_autograd

from .. import reference
from ..arguments import TRANSPOSED, ConvolutionArguments, compute_dtype
from . import kept

# With fewer positions of the outputs, torch's gradient of the weight has smaller errors; with fewer channels of x or of
# the output, it is faster.
MIN_POSITIONS, MIN_CHANNELS = 2048, 32


def _output(a):
    """The uninitialized output."""
    return a.x.new_empty(a.out_shape())


def native_conv3x3(a: ConvolutionArguments) -> torch.Tensor:
    """The output, computed by the C++ kernel; the arguments are valid, and `why_not_float` has no objection."""
    transposed = a.padding == TRANSPOSED
    if not a.x.numel():
        return _output(a)
    if transposed and any(side % 2 for side in a.x.shape[2:]):
        dtype = compute_dtype(a.x.dtype)
        other, bias, add = (backends.readable(t, dtype) for t in (a.other, a.bias, a.add))
        x, other = F.pad(a.x.to(dtype), (1, 1, 1, 1)), None if other is None else F.pad(other, (1, 1, 1, 1))
        padded = native_conv3x3(ConvolutionArguments(x, a.weight.to(dtype), None, other, None, False, "zeros"))
        return reference.finish(reference.fold(padded), bias, add, a.relu).to(a.x.dtype)
    prepared = None
    if not transposed and kept.is_kept(a.weight):
        prepared = kept.once(a.weight, "conv3x3", (a.weight,), lambda: _prepared(a.weight))
    return NativeConv3x3(a.weight, a.bias, a.relu, a.padding, prepared)(a.x, a.other, a.add)


class NativeConv3x3:
    """The C++ kernel with its weight, bias and options; valid ones, for which `why_not_float` has no objection."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        relu: bool,
        padding: str,
        prepared: torch.Tensor | None = None,
    ):
        self.outputs, transposed = len(weight), padding == TRANSPOSED
        self._dtype = compute_dtype(weight.dtype)
        # Referenced while the kernel may read them.
        self._weight = backends.readable(weight, self._dtype) if prepared is None else None
        self._prepared, self._bias = prepared, backends.readable(bias, self._dtype)
        self._options = {
            "weight": backends.address(self._weight),
            "prepared": backends.address(prepared),
            "bias": backends.address(self._bias),
            "type": backends.TYPES[self._dtype],
            "outputs": self.outputs,
            "padding": backends.PADDINGS["zeros" if transposed else padding],
            "transposed": transposed,
            "relu": relu,
        }

    @staticmethod
    def constant(weight: torch.Tensor, bias: torch.Tensor | None, relu: bool, padding: str) -> "NativeConv3x3":
        """The same for many calls: the weight is transformed, and the bias copied, here."""
        return NativeConv3x3(weight, bias if bias is None else bias.clone(), relu, padding, _prepared(weight))

    def __call__(
        self,
        x: torch.Tensor,
        other: torch.Tensor | None = None,
        add: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The convolution of x and other, plus bias and add, with the ReLU of this, plus the residual."""
        batch, _, height, width = x.shape
        inputs = [_with_contiguous_images(t.to(self._dtype)) for t in (x, other) if t is not None]
        add, residual = (backends.readable(t, self._dtype) for t in (add, residual))
        out = native.empty((batch, self.outputs, height, width), inputs[0])
        native.load()[0].conv3x3(
            **self._options,
            size=(batch, height, width),
            x=_described(inputs),
            add=backends.address(add),
            residual=backends.address(residual),
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return out.to(x.dtype)


def _prepared(weight):
    """The transformed weight."""
    weight = weight.detach().to(compute_dtype(weight.dtype)).contiguous()
    options = {"type": backends.TYPES[weight.dtype], "threads": torch.get_num_threads()}
    options |= {"size": (weight.shape[1], len(weight)), "weight": weight.data_ptr()}
    prepare = native.load()[0].prepare_conv3x3
    out = torch.empty(prepare(prepared=0, **options), dtype=weight.dtype, device=weight.device)
    prepare(prepared=out.data_ptr(), **options)
    return out


def _with_contiguous_images(x):
    """x, copied unless each of its images is contiguous, as half of the channels of a tensor is."""
    return x if x[0].is_contiguous() else x.contiguous()


def _reference(a):
    return reference.conv3x3(*a)


CONV3X3 = Op(
    "conv3x3",
    ConvolutionArguments,
    {
        "cpu": Backend(backends.why_not_float, native_conv3x3),
        "reference": Backend(always, _reference),
        # torch's convolution, so that "triton" can be requested for a whole network.
        "triton": Backend(always, _reference),
    },
    warns=False,  # the reference is torch's own convolution
)


conv3x3 = define(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? other, Tensor? add, bool relu, str padding, str backend)"
    " -> Tensor",
    CONV3X3.forward,
    CONV3X3.fake(_output),
)


def _setup_context(ctx, inputs, output):
    x, weight, _, other, _, ctx.relu, ctx.padding, ctx.backend = inputs
    ctx.save_for_backward(x, weight, other, output if ctx.relu else None)


def _autograd(ctx, grad):
    x, weight, other, output = ctx.saved_tensors
    needs = needs_x, needs_weight, needs_bias, needs_other, _ = ctx.needs_input_grad[:5]
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    d_x = d_weight = d_other = None
    if needs_x or needs_other:
        d_x, d_other = _gradients_of_inputs(x, other, grad, weight, ctx)
    if needs_weight:
        d_weight = weight_gradient(x, other, grad, ctx.padding, ctx.backend)
    d_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return *only_needed((d_x, d_weight, d_bias, d_other, grad), needs), None, None, None


# The gradient of the input is a convolution with the transposed padding.
_OF_GRADIENT = {"reflect": TRANSPOSED, TRANSPOSED: "reflect", "zeros": "zeros"}


def input_gradient(
    grad: torch.Tensor, weight: torch.Tensor, padding: str, backend: str = "", other: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of both inputs' channels: a convolution with the kernels rotated by 180 degrees.

    Args:
        grad: [B, O, H, W], of the output; if other is given, of its first channels.
        weight: [O, C, 3, 3], of the convolution.
        padding, backend: of the convolution.
        other: the gradient of the output's other channels, or None.
    """
    return conv3x3(grad, weight.flip(2, 3).transpose(0, 1), None, other, None, False, _OF_GRADIENT[padding], backend)


def _gradients_of_inputs(x, other, grad, weight, ctx):
    """`input_gradient` as the gradients of x and of other, None if that is None."""
    both = input_gradient(grad, weight, ctx.padding, ctx.backend)
    return (both, None) if other is None else both.split((x.shape[1], other.shape[1]), 1)


register_autograd("conv3x3", _setup_context, _autograd)


def _of_gradient(x, other, grad, padding):
    """The convolution's checked arguments, with an uninitialized weight."""
    require_tensor(x, "x", dims=(4,))
    require_tensor(grad, "grad", dims=(4,), like=x)
    channels = x.shape[1] + (0 if other is None else other.shape[1])
    a = ConvolutionArguments(x, x.new_empty(grad.shape[1], channels, 3, 3), None, other, None, False, padding)
    a.check()
    require_match(grad, "grad", a.out_shape(), x.dtype, x.device)
    return a


def _weight_gradient(x, other, grad, padding, backend):
    a = _of_gradient(x, other, grad, padding)
    native_runs = CONV3X3.choose(backend, a.facts()).forward is native_conv3x3
    if native_runs and compute_dtype(x.dtype) != x.dtype:
        x, other, grad = (t if t is None else t.to(compute_dtype(t.dtype)) for t in (x, other, grad))
        return _weight_gradient(x, other, grad, padding, backend).to(a.x.dtype)
    few = grad[:, 0].numel() < MIN_POSITIONS or min(a.weight.shape[:2]) < MIN_CHANNELS
    if not native_runs or padding == TRANSPOSED or few:
        outside = F.pad(grad, (1, 1, 1, 1), mode="reflect") if padding == TRANSPOSED else grad
        return torch.nn.grad.conv2d_weight(reference.pad(x, other, padding), a.weight.shape, outside).contiguous()
    inputs, grad = [_with_contiguous_images(t) for t in (x, other) if t is not None], grad.contiguous()
    native.load()[0].conv3x3_weight_gradient(
        type=backends.TYPES[x.dtype],
        size=(len(x), *x.shape[2:]),
        x=_described(inputs),
        outputs=grad.shape[1],
        padding=backends.PADDINGS[padding],
        grad=grad.data_ptr(),
        out=a.weight.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return a.weight


def _described(inputs):
    """(address, channels, batch stride) of two inputs, as the C++ kernels take them."""
    return [*((t.data_ptr(), t.shape[1], t.stride(0)) for t in inputs), (0, 0, 0)][:2]


def _weight_gradient_fake(x, other, grad, padding, backend):
    return _of_gradient(x, other, grad, padding).weight


# The gradient of conv3x3's weight [O, C + D, 3, 3], from the inputs and the output's gradient [B, O, H, W].
weight_gradient = define(
    "conv3x3_weight_gradient(Tensor x, Tensor? other, Tensor grad, str padding, str backend) -> Tensor",
    _weight_gradient,
    _weight_gradient_fake,
)


def _setup_context_of_weight(ctx, inputs, output):
    x, other, grad, ctx.padding, ctx.backend = inputs
    ctx.save_for_backward(x, other, grad)


def _autograd_of_weight(ctx, d_weight):
    x, other, grad = ctx.saved_tensors
    needs_x, needs_other, needs_grad, *_ = ctx.needs_input_grad
    d_x = d_other = d_grad = None
    if needs_x or needs_other:
        d_x, d_other = _gradients_of_inputs(x, other, grad, d_weight, ctx)
    if needs_grad:
        d_grad = conv3x3(x, d_weight, None, other, None, False, ctx.padding, ctx.backend)
    return d_x, d_other, d_grad, None, None


register_autograd("conv3x3_weight_gradient", _setup_context_of_weight, _autograd_of_weight)
