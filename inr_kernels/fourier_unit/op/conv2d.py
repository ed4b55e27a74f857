"""The op conv2d in torch, a convolution of any kernel, also transposed: schema, fake, autograd, and its backends.

x [B, C, H, W], weight [O, C, kh, kw] (transposed [C, O, kh, kw]), scale, bias [O], add as the output -> [B, O, H', W']

In C++ for float32 and float64 on a CPU, and for half precision where torch is slow; elsewhere torch's convolution. The
backward consists of convolutions again, so there are derivatives of every order.
"""

from collections.abc import Sequence

import torch

from inr_kernels._core import backends, native
from inr_kernels._core.dispatch import Backend, Op, always
from inr_kernels._core.registration import define, only_needed, register_autograd

from .. import reference
from ..arguments import Conv2dArguments, compute_dtype
from . import kept


def _output(a):
    """The uninitialized output."""
    return a.x.new_empty(a.out_shape())


def native_conv2d(a: Conv2dArguments) -> torch.Tensor:
    """The output, computed by the C++ kernel; the arguments are valid, and `why_not_float` has no objection."""
    if not a.x.numel():
        return _output(a)
    kernel = NativeConv2d(a)
    if kept.is_kept(a.weight):
        count = kernel.prepared_size(a)
        name = f"conv2d, {a.transposed}, {a.stride}, {a.padding}, {count}"
        kernel.use_prepared(kept.once(a.weight, name, (a.weight,), lambda: kernel.prepare(a, count)))
    return kernel(a.x, a.add, a.out_shape())


class NativeConv2d:
    """The C++ kernel with its weight, scale, bias and options; valid ones, for which `why_not_float` has no objection.

    Args:
        a: all arguments of a call, of which x and add are not used.
    """

    def __init__(self, a: Conv2dArguments):
        self._prepared: torch.Tensor | None = None
        self._dtype = compute_dtype(a.weight.dtype)
        # Referenced while the kernel may read them.
        self._weight: torch.Tensor | None = a.weight
        self._scale, self._bias = (backends.readable(t, self._dtype) for t in (a.scale, a.bias))
        self._problem = {
            "type": backends.TYPES[self._dtype],
            "kernel": tuple(a.weight.shape[2:]),
            "stride": tuple(a.stride),
            "pad": tuple(a.padding),
            "padding": backends.PADDINGS[a.padding_mode],
            "transposed": a.transposed,
        }
        self._finish = {
            "scale": backends.address(self._scale),
            "bias": backends.address(self._bias),
            "relu": a.relu,
        }

    @staticmethod
    def pointwise(weight: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> "NativeConv2d":
        """A 1 x 1 convolution for many calls: the weight is packed, and the bias copied, here."""
        pixel, bias = weight.new_empty(1, weight.shape[1], 1, 1), bias if bias is None else bias.clone()
        a = Conv2dArguments(pixel, weight, None, bias, None, relu, (1, 1), (0, 0), "zeros", False, (0, 0))
        kernel = NativeConv2d(a)
        kernel.use_prepared(kernel.prepare(a, kernel.prepared_size(a)))
        return kernel

    def prepared_size(self, a: Conv2dArguments) -> int:
        """Elements of the transformed weight, in the form for x's size."""
        return native.load()[0].prepare_conv2d(**self._described(a.x.shape, a.out_shape()), weight=0, prepared=0)

    def prepare(self, a: Conv2dArguments, count: int) -> torch.Tensor:
        """The transformed weight, of `count` elements."""
        weight = backends.readable(a.weight, self._dtype)
        out = a.weight.new_empty(count, dtype=self._dtype)
        problem = self._described(a.x.shape, a.out_shape())
        native.load()[0].prepare_conv2d(**problem, weight=backends.address(weight), prepared=out.data_ptr())
        return out

    def use_prepared(self, prepared: torch.Tensor) -> None:
        """Takes the transformed weight for all calls."""
        self._prepared, self._weight = prepared, None

    def _described(self, size, out_size):
        sizes = {"size": tuple(size), "out_size": tuple(out_size[1:]), "threads": torch.get_num_threads()}
        return self._problem | sizes

    def __call__(self, x: torch.Tensor, add: torch.Tensor | None, out_shape: Sequence[int]) -> torch.Tensor:
        """The convolution of x, plus bias and add."""
        weight, add = (backends.readable(t, self._dtype) for t in (self._weight, add))
        inputs = x.to(self._dtype).contiguous()
        out = native.empty(out_shape, inputs)
        native.load()[0].conv2d(
            **self._described(x.shape, out_shape),
            **self._finish,
            weight=backends.address(weight),
            x=inputs.data_ptr(),
            prepared=backends.address(self._prepared),
            add=backends.address(add),
            out=out.data_ptr(),
        )
        return out.to(x.dtype)


def _reference(a):
    return reference.conv2d(*a)


CONV2D = Op(
    "conv2d",
    Conv2dArguments,
    {
        "cpu": Backend(backends.why_not_float, native_conv2d),
        "reference": Backend(always, _reference),
        # torch's convolution, so that "triton" can be requested for a whole network.
        "triton": Backend(always, _reference),
    },
    warns=False,  # the reference is torch's own convolution
)


conv2d = define(
    "conv2d(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? add, bool relu, SymInt[] stride,"
    " SymInt[] padding, str padding_mode, bool transposed, SymInt[] output_padding, str backend) -> Tensor",
    CONV2D.forward,
    CONV2D.fake(_output),
)


def _setup_context(ctx, inputs, output):
    x, weight, scale, _, _, ctx.relu, *ctx.options = inputs
    _, needs_weight, needs_scale, *_ = ctx.needs_input_grad
    ctx.size = x.shape[2:]
    ctx.save_for_backward(x if needs_weight or needs_scale else None, weight, scale, output if ctx.relu else None)


def _autograd(ctx, grad):
    x, weight, scale, output = ctx.saved_tensors
    stride, padding, padding_mode, transposed, extra, backend = ctx.options
    needs = needs_x, needs_weight, needs_scale, needs_bias, _ = ctx.needs_input_grad[:5]
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    d_x = d_weight = d_scale = None
    if needs_scale:
        d_scale = (grad * conv2d(x, weight, None, None, None, False, *ctx.options)).sum((0, 2, 3))
    scaled = grad if scale is None else grad * scale.view(-1, 1, 1)
    if needs_x:
        d_x = _input_gradient(scaled, weight, ctx.size, stride, padding, padding_mode, transposed, backend)
    if needs_weight and transposed:
        d_weight = _weight_gradient(scaled, weight.shape, x, stride, padding)
    elif needs_weight:
        if padding_mode == "reflect":
            x, padding = torch.nn.functional.pad(x, reference.sides(padding), mode="reflect"), (0, 0)
        d_weight = _weight_gradient(x, weight.shape, scaled, stride, padding)
    d_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return *only_needed((d_x, d_weight, d_scale, d_bias, grad), needs), *[None] * 7


def _weight_gradient(x, shape, grad, stride, padding):
    """The gradient of a weight of this shape, by torch; in `compute_dtype` where half precision is slow."""
    dtype = compute_dtype(x.dtype) if backends.is_for_native(x) else x.dtype
    d_weight = torch.nn.grad.conv2d_weight(x.to(dtype), shape, grad.to(dtype), tuple(stride), tuple(padding))
    return d_weight.to(x.dtype)


def _input_gradient(grad, weight, size, stride, padding, padding_mode, transposed, backend):
    """The gradient of x [B, C, *size] from that of the convolution."""
    if transposed:
        return conv2d(grad, weight, None, None, None, False, stride, padding, "zeros", False, (0, 0), backend)
    if padding_mode == "reflect":
        padded = [n + 2 * pad for n, pad in zip(size, padding, strict=True)]
        d_padded = _input_gradient(grad, weight, padded, stride, (0, 0), "zeros", False, backend)
        like = d_padded[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
        return torch.ops.aten.reflection_pad2d_backward(d_padded, like, reference.sides(padding))
    # Pixels at the end that no output reads: the transposed convolution's output_padding.
    numbers = zip(size, weight.shape[2:], stride, padding, strict=True)
    extra = [(n + 2 * pad - kernel) % step for n, kernel, step, pad in numbers]
    return conv2d(grad, weight, None, None, None, False, stride, padding, "zeros", True, extra, backend)


register_autograd("conv2d", _setup_context, _autograd)
