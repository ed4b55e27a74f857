"""How torch knows conv3x3, the convolution beside a Fourier unit: its schema, its fake, its autograd.

x [B, C, H, W], other [B, D, H, W] or None, weight [O, C + D, 3, 3], bias [O], add as the output  ->  [B, O, H, W]

In C++ (Winograd) for float32 and float64 on a CPU; elsewhere a library's convolution is as good as any. The backward
is made of convolutions again, so that there is a derivative of every order.
"""

import torch
import torch.nn.functional as F

from inr_kernels._core import backends, dispatch, native
from inr_kernels._core.registration import LIBRARY, define

from .. import reference

_PADDINGS = {"zeros": 0, "reflect": 2}


_DTYPES = torch.float32, torch.float64


def is_for_native(x):
    """Whether a tensor is one that the C++ kernel takes."""
    return x.device.type == "cpu" and x.dtype in _DTYPES


def why_not_winograd(facts):
    """Why the C++ kernel cannot run, "" if it can."""
    if facts.dtype not in _DTYPES:
        return f"it takes float32 and float64; got {str(facts.dtype).removeprefix('torch.')}"
    return backends.why_not_cpu(facts)


def _check(x, weight, bias, other, add, padding):
    """What the kernel relies on for its memory's sake."""
    channels = x.shape[1] + (0 if other is None else other.shape[1])
    out = (len(x), len(weight), *x.shape[2:])
    fits = x.dim() == weight.dim() == 4 and list(weight.shape[1:]) == [channels, 3, 3] and padding in _PADDINGS
    fits = fits and (bias is None or list(bias.shape) == [len(weight)]) and (add is None or add.shape == out)
    fits = fits and (other is None or (len(other), *other.shape[2:]) == (len(x), *x.shape[2:]))
    alike = all(t is None or (t.dtype, t.device) == (x.dtype, x.device) for t in (weight, bias, other, add))
    if not (fits and alike) or min(x.shape[1:]) < 1 or (padding == "reflect" and min(x.shape[2:]) < 2):
        raise ValueError(f"tensors or padding {padding!r} do not fit x {list(x.shape)}, weight {list(weight.shape)}")


def _conv3x3(x, weight, bias, other, add, relu, padding, backend):
    _check(x, weight, bias, other, add, padding)
    library, wish = native.load()[0], dispatch.wished(backend)
    if wish:
        dispatch.OPS["conv3x3"].choose(wish, backends.Facts(x.device, x.dtype))
    if library is None or not is_for_native(x) or wish not in ("", "cpu"):
        return reference.conv3x3(x, weight, bias, other, add, relu, padding)
    out = x.new_empty(len(x), len(weight), *x.shape[2:])
    if not out.numel():
        return out
    parts = [_images(t) for t in (x, other) if t is not None]
    weight, bias, add = (None if t is None else t.contiguous() for t in (weight, bias, add))
    library.conv3x3(
        type=backends.TYPES[x.dtype],
        size=(len(x), *x.shape[2:]),
        x=[*((t.data_ptr(), t.shape[1], t.stride(0)) for t in parts), (0, 0, 0)][:2],
        outputs=len(weight),
        padding=_PADDINGS[padding],
        weight=weight.data_ptr(),
        bias=backends.address(bias),
        add=backends.address(add),
        relu=relu,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def _images(x):
    """x, a copy unless each of its images is contiguous: half of the channels of a tensor needs none."""
    return x if x[0].is_contiguous() else x.contiguous()


def _fake(x, weight, *_):
    return x.new_empty(len(x), len(weight), *x.shape[2:])


conv3x3 = define(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? other, Tensor? add, bool relu, str padding, str backend)"
    " -> Tensor",
    _conv3x3,
    _fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, _, other, _, ctx.relu, ctx.padding, ctx.backend = inputs
    ctx.save_for_backward(x, weight, other, output if ctx.relu else None)


def _autograd(ctx, grad):
    x, weight, other, output = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_other, needs_add = ctx.needs_input_grad[:5]
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    d_x = d_weight = d_other = None
    if needs_x or needs_other:
        d_x = _input_gradient(grad, weight, ctx.padding, ctx.backend)
        if other is not None:
            d_x, d_other = d_x.split((x.shape[1], other.shape[1]), 1)
    if needs_weight:
        d_weight = torch.nn.grad.conv2d_weight(reference.pad(x, other, ctx.padding), weight.shape, grad)
    d_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return d_x, d_weight, d_bias, d_other, grad if needs_add else None, None, None, None


def _input_gradient(grad, weight, padding, backend):
    """The gradient of both inputs' channels: the same convolution, its kernels turned round."""
    turned = weight.flip(2, 3).transpose(0, 1)
    if padding == "zeros":
        return conv3x3(grad, turned, None, None, None, False, "zeros", backend)
    padded = conv3x3(F.pad(grad, (1, 1, 1, 1)), turned, None, None, None, False, "zeros", backend)
    inner = grad.new_empty(len(grad), weight.shape[1], *grad.shape[2:])
    return torch.ops.aten.reflection_pad2d_backward(padded, inner, [1, 1, 1, 1])


torch.library.register_autograd("inr_kernels::conv3x3", _autograd, setup_context=_setup_context, lib=LIBRARY)
